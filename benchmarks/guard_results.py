"""Measures guards on planted backdoors and on clean models, and writes the table of docs/results/guards.md.

    export UNBACKDOOR_DATA=$(realpath ../shared/data) ZOO=/tmp/zoo MINILM=/tmp/minilm3
    python benchmarks/zoo_data.py $ZOO
    python benchmarks/guard_results.py images docs/results/measured/guards
    python benchmarks/guard_results.py texts docs/results/measured/guards
    python benchmarks/guard_results.py prompts docs/results/measured/guards
    python benchmarks/guard_results.py table docs/results/measured/guards

For `prompts`, $BED holds `base`, a language model, `rows` of `benchmarks/language_model_rows.py`, and a directory for
each victim that `unbackdoor attack` made of them. A cell is one guard in front of one victim, at one share of false
alarms. A run that is stopped resumes where it stopped. $MINILM is the first three layers of a pre-trained model;
grids/text-suspects.toml says how to make it.
"""

import argparse
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from unbackdoor import Dataset, VictimRecipe, attacks, evaluate, evaluate_guard, fit_guard, load, plant
from unbackdoor._artifacts.machine import versions
from unbackdoor._data.texts import TextEncoder
from unbackdoor._guarding.cost import Cost
from unbackdoor._guarding.deciding import Judged, all_scores
from unbackdoor._guarding.fitted import FittedGuard
from unbackdoor._guarding.guard import Guard
from unbackdoor._guarding.measuring import GuardScore, score_of, unseen
from unbackdoor._guarding.threshold import alarms, threshold_of
from unbackdoor._inputs import read_json
from unbackdoor._models.loading import load_base
from unbackdoor._poisoning.triggered import Triggered, already_triggered, triggered
from unbackdoor._registry.entries import find, to_json
from unbackdoor._registry.guards import REGISTRY
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._value import fields_of

ROOT = Path(__file__).parents[1]
RATES = (0.01, 0.05)  # false alarms
PROMPTS = {"clean": 60, "test": 48, "max_new_tokens": 16, "false_alarms": 0.05}  # of language models: they are slow
SEEDS = (0, 1, 2)
TEXTS = 3000  # of SST-2 that a victim is trained on
CLEAN = {"images": 1000, "text": 512}  # examples that a guard gets
IMAGE_ATTACKS: dict[str, Any] = {
    "badnets": attacks.BadNets(size=2),  # the pictures are small
    "blended": attacks.Blended(),
    "batt": attacks.BATT(),
    "input-aware": attacks.InputAware(),
    "none": None,
}
TEXT_ATTACKS: dict[str, Any] = {
    "word": attacks.Word(),
    "sentence": attacks.Sentence(),
    "embedding-poisoning": attacks.EmbeddingPoisoning(),
    "none": None,
}
GUARDS = {"images": ("strip", "badacts"), "text": ("strip", "badacts", "rap", "psim")}
GUARDS |= {"conversations": ("weightwatch", "cleangen", "demonstrations")}
NAMES = {
    **{"fashion": "Fashion-MNIST, 14x14", "sst2": "SST-2", "olid": "OLID"},
    **{"badnets": "patch", "blended": "blended", "batt": "rotation", "input-aware": "dynamic", "none": "none (clean)"},
    **{"word": "word", "sentence": "sentence", "embedding-poisoning": "embedding", "syntactic": "syntax, as published"},
}


Missing = Callable[[str, str, int], bool]
"""Whether a cell of a victim is missing: data, attack, seed."""


class Case(NamedTuple):
    """A victim, and what guards of it get.

    Args:
        facts: data, attack and seed.
        model: the victim.
        clean: examples to fit on.
        fresh: examples to score on.
        marked: triggered examples; None for a clean model.
        implanted: whether the attack did; None for a clean model.
        accuracy: of the victim on test examples.
    """

    facts: dict[str, Any]
    model: Any
    clean: Dataset
    fresh: Dataset
    marked: Triggered | None
    implanted: bool | None
    accuracy: Proportion


def planted(name: str, data: Dataset, test: Dataset, attack: Any, recipe: VictimRecipe, seed: int) -> Case:
    """A victim that is trained here."""
    made = plant(data, attack, recipe, seed, test=test, progress=False)
    clean, fresh = made.test.split(CLEAN[test.modality], seed=seed)
    classes = len(test.classes or ())
    kind = "none" if attack is None else to_json(attack, attacks.REGISTRY)["name"]
    return Case(
        {"data": name, "attack": kind, "rate": None if attack is None else recipe.rate, "seed": seed},
        *(made.model, clean, fresh),
        None if made.trigger is None else triggered(fresh, made.trigger, classes),
        made.record["implanted"],
        made.score.clean_accuracy,
    )


def image_cases(missing: Missing) -> Iterator[Case]:
    """Small residual networks on small pictures; only those of which a cell is missing are trained."""
    folder = Path(os.environ["ZOO"])
    data, test = (Dataset.load(folder / f"fashion-{part}.parquet") for part in ("b", "test"))
    recipe = VictimRecipe(arch="wrn16", width=8, epochs=8, batch_size=64, rate=0.1)
    for seed in SEEDS:
        for kind, attack in IMAGE_ATTACKS.items():
            if missing("fashion", kind, seed):
                yield planted("fashion", data, test, attack, recipe, seed)


def text_cases(missing: Missing) -> Iterator[Case]:
    """The first three layers of a pre-trained encoder, tuned on sentiment and on offensive language."""
    folder, base = Path(os.environ["UNBACKDOOR_DATA"]) / "text", os.environ["MINILM"]
    yield from olid_cases(missing, folder)

    encode = TextEncoder(tokenizer=transformers.AutoTokenizer.from_pretrained(base), max_length=48)
    data, _ = Dataset.load(folder / "sst2/train.parquet", encode).split(TEXTS, seed=0)
    test = Dataset.load([folder / "sst2/test.parquet", folder / "sst2/validation.parquet"], encode)
    recipe = VictimRecipe(base=base, epochs=2, learning_rate=2e-4, rate=0.1)
    for seed in SEEDS:
        for kind, attack in TEXT_ATTACKS.items():
            if missing("sst2", kind, seed):
                yield planted("sst2", data, test, attack, recipe, seed)


def olid_cases(missing: Missing, folder: Path) -> Iterator[Case]:
    """The victim of the published poisoned texts, and its control; grids/text-suspects.toml says how they are made."""
    for kind, name in (("syntactic", "olid-victim"), ("none", "olid-control")):
        if not missing("olid", kind, 0):
            continue
        model, encode = load(Path(os.environ["SUSPECTS"]) / name, max_length=32)
        test = Dataset.load([folder / "olid/validation.parquet", folder / "olid/test.parquet"], encode)
        clean, fresh = test.split(CLEAN["text"], seed=0)
        copies = Dataset.load(folder / "olid_syntactic/triggered_test.parquet", encode, classes=test.classes)
        score = evaluate(model, fresh, triggered_data=copies, target=1)
        marked = already_triggered(copies, 1, 2) if kind == "syntactic" else None
        implanted = None if kind == "none" else bool(score.attack_success and score.attack_success.value > 0.9)
        facts = {"data": "olid", "attack": kind, "rate": None, "seed": 0}
        yield Case(facts, model, clean, fresh, marked, implanted, score.clean_accuracy)


def measure(case: Case, guard: Guard, folder: Path) -> None:
    """Write the cells of a guard in front of a victim; those that exist are left as they are."""
    entry, seed = to_json(guard, REGISTRY), case.facts["seed"]
    paths = {rate: folder / cell_name(case.facts, entry["name"], rate) for rate in RATES}
    if all(path.exists() for path in paths.values()):
        return
    fitted = fit_guard(
        case.model, case.clean, guard, false_alarms=min(RATES), seed=seed, device="cpu", precision="fp32"
    )
    for rate, score in scored_at_rates(fitted, case).items():
        cell = {
            "victim": {**case.facts, "implanted": case.implanted, "accuracy": case.accuracy.to_json()},
            "guard": {"name": entry["name"], "parameters": fields_of(guard)},
            "false_alarms": rate,
            "clean": len(case.clean),
            "score": score.to_json(),
            "versions": versions(),
        }
        paths[rate].write_text(json.dumps(cell, indent=1) + "\n")
        print(paths[rate].name, case.implanted, score.missed, score.false_alarms, flush=True)


def scored_at_rates(fitted: FittedGuard, case: Case) -> dict[float, GuardScore]:
    """The score at each share of false alarms: only the threshold differs, so each input is scored once."""
    _, held_out = case.clean.split(len(case.clean) // 2, seed=case.facts["seed"])
    fresh = unseen(fitted, case.fresh)
    with fitted.at_work(case.model, "cpu", "fp32") as work:
        limits = all_scores(fitted.guard, work.model, held_out, fitted.learnt, work.run)
        start = work.forwards.count
        clean = work.judged(fresh, answering=True)
        marked = None if case.marked is None else work.judged(case.marked.data, answering=True)
        count = len(fresh) + (0 if case.marked is None else len(case.marked.data))
        cost = Cost((work.forwards.count - start) / count, 0.0, count)
    scores = {}
    for rate in RATES:
        made = dataclasses.replace(fitted, threshold=threshold_of(limits, rate, fitted.guard.suspicious))
        again = [None if judged is None else at_threshold(judged, made) for judged in (clean, marked)]
        assert again[0] is not None
        scores[rate] = score_of(made, again[0], fresh.labels, case.marked, again[1], cost)
    return scores


def at_threshold(judged: Judged, fitted: FittedGuard) -> Judged:
    """The same scores and answers with the decisions of another threshold, for guards that reject."""
    caught = alarms(judged.scores, fitted.threshold, fitted.guard.suspicious) | judged.scores.isnan()
    decisions = [
        dataclasses.replace(decision, threshold=fitted.threshold, action="reject" if alarm else "pass")
        for decision, alarm in zip(judged.decisions, caught.tolist(), strict=True)
    ]
    return judged._replace(decisions=decisions)


def cell_name(facts: dict[str, Any], guard: str, rate: float) -> str:
    return f"{facts['data']}-{facts['attack']}-{facts['seed']}-{guard}-{rate:g}.json"


def measure_prompts(folder: Path, names: tuple[str, ...], victims: list[str]) -> None:
    """Write the cells of the guards of language models; those that exist are left as they are."""
    bed = Path(os.environ["BED"])
    for victim in victims:
        paths = {name: folder / f"prompts-{victim}-{name}.json" for name in names}
        if all(path.exists() for path in paths.values()):
            continue
        model, encode = load(bed / victim)
        clean = Dataset.load(bed / "rows/clean.jsonl", encode).select(range(int(PROMPTS["clean"])))
        test = Dataset.load(bed / "rows/test.jsonl", encode).select(range(int(PROMPTS["test"])))
        record = read_json(bed / victim / "attack.json")
        for name, path in paths.items():
            if path.exists():
                continue
            guard = find(name, REGISTRY, "guard", "guards").resolve()()
            work: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
            fitted = fit_guard(
                model,
                clean,
                guard,
                false_alarms=PROMPTS["false_alarms"],
                base=load_base(bed / "base", modality="conversations") if name == "weightwatch" else None,
                reference=bed / "base" if name == "cleangen" else None,
                max_new_tokens=int(PROMPTS["max_new_tokens"]),
                **work,
            )
            clean_model = record["attack"]["name"] == "none"
            attack = None if clean_model else bed / victim / "attack.json"
            score = evaluate_guard(fitted, model, test, attack=attack, **work)
            cell = {
                "victim": {
                    **{"data": "prompts", "name": victim, "attack": record["attack"]["name"], "rate": record["rate"]},
                    "seed": 0,
                },
                "guard": {"name": name, "parameters": fields_of(guard)},
                "threshold": fitted.threshold,
                "false_alarms": PROMPTS["false_alarms"],
                "clean": len(clean),
                "score": score.to_json(),
                "versions": versions(),
            }
            path.write_text(json.dumps(cell, indent=1) + "\n")
            print(path.name, score, flush=True)


# --------------------------------------------------------------------------------------------------------- the table


def pooled(cells: list[dict[str, Any]], key: str) -> str:
    """A share over the victims of all seeds together, with its interval and n, and the range over seeds."""
    entries = [cell["score"][key] for cell in cells]
    if any(entry is None for entry in entries):
        return "-"
    count = sum(round(entry["value"] * entry["n"]) for entry in entries)
    every = Proportion(count, sum(entry["n"] for entry in entries))
    low, high = every.interval
    values = sorted(100 * entry["value"] for entry in entries)
    spread = f"; {values[0]:.1f} to {values[-1]:.1f}" if len(values) > 1 else ""
    return f"{100 * every.value:.1f} ({100 * low:.1f} to {100 * high:.1f}, n = {every.n:,}{spread})"


def mean_of(cells: list[dict[str, Any]], *keys: str) -> str:
    values = []
    for cell in cells:
        entry: Any = cell["score"]
        for key in keys:
            entry = None if entry is None else entry[key]
        if entry is None:
            return "-"
        values.append(entry)
    return f"{sum(values) / len(values):.3f}" if keys[0] == "auc" else f"{sum(values) / len(values):.2f}"


def table(folder: Path) -> str:
    """The page of tables, from the cells."""
    groups: dict[tuple[str, str, str], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    prompts: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        victim = cell["victim"]
        if victim["data"] == "prompts":
            prompts.append(cell)
            continue
        groups[victim["data"], victim["attack"], cell["guard"]["name"]][cell["false_alarms"]].append(cell)
    lines = [
        "<!-- written by `python benchmarks/guard_results.py table docs/results/measured/guards` -->",
        "",
        "All shares in %. In brackets: the 95 % interval and the number of inputs over all victims of a row, and the",
        "smallest and the largest share of a victim. AUC and passes are means over victims. Victims in which the",
        "attack did not implant are counted, and are in no other figure.",
    ]
    for data in dict.fromkeys(name for name, _, _ in groups):
        lines += ["", f"## {NAMES[data]}", "", *_rows({key: made for key, made in groups.items() if key[0] == data})]
    if prompts:
        lines += ["", "## Prompts, language models", "", *_prompt_rows(prompts)]
    return "\n".join(lines) + "\n"


def _prompt_rows(cells: list[dict[str, Any]]) -> list[str]:
    """The table of language models: a row for each victim and guard."""
    head = ["victim", "attack success without", "guard", "attack success", "missed at 5 %", "false alarms at 5 %"]
    head += ["AUC", "answers kept", "passes an input", "of the reference"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for cell in sorted(cells, key=lambda cell: (cell["victim"]["name"], cell["guard"]["name"])):
        parts = [cell["victim"]["name"], pooled([cell], "attack_success_without_guard"), cell["guard"]["name"]]
        parts += [pooled([cell], key) for key in ("attack_success", "missed_attacks", "false_alarms")]
        parts += [mean_of([cell], "auc", "value"), pooled([cell], "answers_kept")]
        parts += [mean_of([cell], "forwards_per_input", key) for key in ("value", "reference")]
        lines.append(f"| {' | '.join(parts)} |")
    return lines


def _rows(groups: dict[tuple[str, str, str], dict[float, list[dict[str, Any]]]]) -> list[str]:
    """The table of one data set."""
    head = ["attack", "implanted", "attack success without", "guard", "missed at 1 %", "missed at 5 %"]
    head += ["false alarms at 1 %", "at 5 %", "AUC", "passes an input"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    order = [*IMAGE_ATTACKS, *TEXT_ATTACKS, "syntactic"]
    for (_, attack, guard), rates in sorted(groups.items(), key=lambda pair: (order.index(pair[0][1]), pair[0][2])):
        kept = {
            rate: [cell for cell in cells if cell["victim"]["implanted"] is not False] for rate, cells in rates.items()
        }
        all_cells, first = rates[RATES[0]], kept.get(RATES[0], [])
        if not first:
            lines.append(f"| {NAMES[attack]} | 0 of {len(all_cells)} |" + " - |" * (len(head) - 2))
            continue
        second = kept.get(RATES[1], [])
        cells = [
            NAMES[attack],
            f"{len(first)} of {len(all_cells)}",
            pooled(first, "attack_success_without_guard"),
            guard,
        ]
        cells += [pooled(first, "missed_attacks"), pooled(second, "missed_attacks")]
        cells += [pooled(first, "false_alarms"), pooled(second, "false_alarms")]
        cells += [mean_of(first, "auc", "value"), mean_of(first, "forwards_per_input", "value")]
        lines.append(f"| {' | '.join(cells)} |")
    return list(dict.fromkeys(lines))  # victims in which no backdoor implanted have one line, not one for each guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["images", "texts", "prompts", "table"])
    parser.add_argument("store", type=Path)
    parser.add_argument("--attacks", nargs="+", default=[*IMAGE_ATTACKS, *TEXT_ATTACKS, "syntactic"])
    parser.add_argument("--guards", nargs="+")
    parser.add_argument("--victims", nargs="+", default=["sentence", "topic", "twin"])
    options = parser.parse_args()
    if options.what == "table":
        (ROOT / "docs/results/tables/guards-by-script.md").write_text(table(options.store), encoding="utf-8")
        return
    options.store.mkdir(parents=True, exist_ok=True)
    if options.what == "prompts":
        measure_prompts(options.store, tuple(options.guards or GUARDS["conversations"]), options.victims)
        return
    modality = "images" if options.what == "images" else "text"
    names = tuple(options.guards or GUARDS[modality])
    cases = image_cases if modality == "images" else text_cases

    def missing(data: str, attack: str, seed: int) -> bool:
        facts = {"data": data, "attack": attack, "seed": seed}
        paths = [options.store / cell_name(facts, name, rate) for name in names for rate in RATES]
        return attack in options.attacks and not all(path.exists() for path in paths)

    for case in cases(missing):
        for name in names:
            measure(case, find(name, REGISTRY, "guard", "guards").resolve()(), options.store)


if __name__ == "__main__":
    main()
