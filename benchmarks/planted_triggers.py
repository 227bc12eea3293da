"""Does a backdoor that is planted on purpose show which purifier removes the one that is there already?

    python benchmarks/planted_triggers.py docs/results/measured/planted.jsonl [badnets blended sig batt]
    python benchmarks/planted_triggers.py docs/results/measured/planted.jsonl --table

The victims of benchmarks/purify_auto.py: handwritten digits of scikit-learn, 300 clean ones, 497 scored. Of the clean
ones, 240 plant a trigger of each family in a copy of the victim, for another class, and purify both; what is left of
the planted trigger is counted on the other 60, and what is left of the victim's own on the 497. A result that the file
has is not measured again. About ten minutes of one core.
"""

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

import unbackdoor as ub
from purify_auto import ATTACKS, EPOCHS, TRAINING, Digits, Network
from unbackdoor import attacks, purifiers
from unbackdoor._models.arithmetic import choose
from unbackdoor._victims.training import train_victim

OWN, HELD, PASSES = "own", 60, 30
FAMILIES = {  # none is the trigger of a victim, nor leads to its class
    "patch": attacks.BadNets(size=2, margin=0, place="top-left", pattern="solid", target=8),
    "pattern": attacks.Blended(pattern_seed=11, target=8),
    "sinusoid": attacks.SIG(delta=60, frequency=3, target=8, label_rule="all-to-one"),
    "rotation": attacks.BATT(angle=-45, benign=20, cover_ratio=1.5, target=8),
}
FAMILY_OF = {"badnets": "patch", "blended": "pattern", "sig": "sinusoid", "batt": "rotation"}
METHODS = {
    "fine-tuning": purifiers.FineTuning(),
    "linear-probing": purifiers.LinearProbing(),
    "ft-init": purifiers.FTInit(),
    "fst": purifiers.FST(),
    "scale-invariant-fst": purifiers.ScaleInvariantFST(),
    "shift-distillation": purifiers.ShiftDistillation(),
    "ft-sam": purifiers.FTSAM(),
    "nad": purifiers.NAD(),
    "fine-pruning": purifiers.FinePruning(),
    "clp": purifiers.CLP(),
    "i-bau": purifiers.IBAU(),
    "neural-cleanse": purifiers.NeuralCleanse(),
    "trigger-distillation": purifiers.TriggerDistillation(),
    "contrastive-unlearning": purifiers.ContrastiveUnlearning(),
}


def trained(model: nn.Module, data: ub.Dataset, epochs: int, learning_rate: float) -> nn.Module:
    """Returns the model, trained in place."""
    arithmetic = choose(model, "cpu", "fp32")
    options: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": 64, "seed": 0}
    return train_victim(model, data, **options, arithmetic=arithmetic, adaptive=False)


def measured(kind: str, file: Path) -> None:
    """Measure what is missing of a victim: its own backdoor, and one of each family."""
    known = {(row["victim"], row["planted"], row["method"]) for row in read(file)}
    data, (attack, rate) = Digits.drawn(), ATTACKS[kind]
    tuned, held = data.clean.split(len(data.clean) - HELD, seed=0)
    torch.manual_seed(0)
    poisoned = ub.poison(data.training, attack, rate=rate, seed=0, classes=10)
    victim = trained(Network(), poisoned.data, EPOCHS, 0.1)
    suspects = {OWN: (victim, poisoned.trigger, data.test)}
    for family, planted in FAMILIES.items():
        mixed = ub.poison(tuned, planted, rate=0.3, seed=0, classes=10)
        suspects[family] = (trained(copy.deepcopy(victim), mixed.data, PASSES, 0.03), mixed.trigger, held)
    for planted, (suspect, trigger, test) in suspects.items():
        for name, method in {"none": None, **METHODS}.items():
            if (kind, planted, name) in known:
                continue
            model = suspect
            if method is not None:
                model = ub.purify(suspect, tuned, method, seed=0, device="cpu", precision="fp32").model
            score = ub.evaluate(model, test, attack=trigger, device="cpu", precision="fp32")
            assert score.attack_success is not None
            row = {"victim": kind, "planted": planted, "method": name, "n": score.attack_success.n}
            row |= {"accuracy": score.clean_accuracy.value, "attack_success": score.attack_success.value}
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            print(row, flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """What each method leaves, and the rank correlation of planted triggers with the victim's own, in Markdown."""
    left = {(row["victim"], row["planted"], row["method"]): 100 * row["attack_success"] for row in rows}
    accuracy = {(row["victim"], row["method"]): 100 * row["accuracy"] for row in rows if row["planted"] == OWN}
    victims = list(dict.fromkeys(row["victim"] for row in rows))
    lines = [f"| method | {' | '.join(victims)} |", "| --- " * (1 + len(victims)) + "|"]
    for name in ("none", *METHODS):
        cells = [
            f"{accuracy[each, name]:.1f} / {left[each, OWN, name]:.1f} / "
            f"{max(left[each, family, name] for family in FAMILIES):.0f}"
            for each in victims
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| which planted triggers | " + " | ".join(victims) + " |", "| --- " * (1 + len(victims)) + "|"]
    for title, families in {
        **{family: (lambda _, family=family: [family]) for family in FAMILIES},
        "mean of all": lambda _: list(FAMILIES),
        "mean of those of other families": lambda each: [f for f in FAMILIES if f != FAMILY_OF[each]],
    }.items():
        cells = []
        for each in victims:
            means = [sum(left[each, f, name] for f in families(each)) / len(families(each)) for name in METHODS]
            own = [left[each, OWN, name] for name in METHODS]
            correlation = float(spearmanr(means, own).statistic)
            cells.append("" if math.isnan(correlation) else f"{correlation:.2f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("victims", nargs="*", default=list(FAMILY_OF))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.table:
        print(table(read(options.file)))
        return
    assert len(Digits.drawn().training) == TRAINING
    for kind in options.victims or FAMILY_OF:
        measured(kind, options.file)


if __name__ == "__main__":
    main()
