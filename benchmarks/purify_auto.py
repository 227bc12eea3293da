"""Measures `auto`, contrastive unlearning and what they are compared with on small victims, as a table in Markdown.

    python benchmarks/purify_auto.py [badnets blended sig batt clean]

Handwritten digits of scikit-learn, 8x8: 1,000 train a victim of two convolutions, 300 others are the clean budget, 497
are scored. Seed 0 for all. It takes some minutes of one core.
"""

import sys
import time
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import unbackdoor as ub
from unbackdoor import attacks, purifiers
from unbackdoor._models.arithmetic import choose
from unbackdoor._victims.training import train_victim

TRAINING, CLEAN, EPOCHS = 1000, 300, 15
ATTACKS = {  # with their poison rates
    "clean": (None, 0.0),
    "badnets": (attacks.BadNets(size=2, margin=0, target=3), 0.05),
    "blended": (attacks.Blended(target=4), 0.1),
    "sig": (attacks.SIG(delta=60, frequency=2, target=5, label_rule="all-to-one"), 0.1),
    "batt": (attacks.BATT(angle=45, benign=20, target=6), 0.1),
}
METHODS = {
    "fine-tuning": purifiers.FineTuning(),
    "scale-invariant-fst": purifiers.ScaleInvariantFST(),
    "trigger-distillation": purifiers.TriggerDistillation(),
    "contrastive-unlearning": purifiers.ContrastiveUnlearning(),
    "adaptive-unlearning": purifiers.AdaptiveUnlearning(),
    "auto": purifiers.Auto(),
}


class Network(nn.Module):
    """Two convolutions with BatchNorm and a linear head, for 8x8 grey pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (batch, 10)."""
        scores: Tensor = self.head(self.features(x).flatten(1))
        return scores


@dataclass
class Digits:
    """The three parts of the data."""

    training: ub.Dataset
    clean: ub.Dataset
    test: ub.Dataset

    @classmethod
    def drawn(cls) -> "Digits":
        """Drawn by seed 0, stratified."""
        raw = load_digits()
        data = ub.Dataset(
            items=torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8).unsqueeze(1),
            labels=torch.from_numpy(raw.target).long(),
            encode=ub.ImageEncoder(mean=(0.3,), std=(0.37,), channels=1),
            classes=tuple("0123456789"),
            name="digits",
        )
        training, rest = data.split(TRAINING, seed=0)
        clean, test = rest.split(CLEAN, seed=0)
        return cls(training, clean, test)


def measured(kind: str, data: Digits) -> None:
    """Train a victim, purify it by each method, and print a row for each."""
    attack, rate = ATTACKS[kind]
    torch.manual_seed(0)
    model: nn.Module = Network()
    poisoned = None if attack is None else ub.poison(data.training, attack, rate=rate, seed=0, classes=10)
    model = train_victim(
        model,
        data.training if poisoned is None else poisoned.data,
        epochs=EPOCHS,
        learning_rate=0.1,
        batch_size=64,
        seed=0,
        arithmetic=choose(model, "cpu", "fp32"),
        adaptive=False,
    )

    def row(name: str, purified: nn.Module, seconds: float | None, kept: str = "") -> None:
        trigger = None if poisoned is None else poisoned.trigger
        score = ub.evaluate(purified, data.test, attack=trigger, device="cpu", precision="fp32")
        shares = [score.clean_accuracy, score.attack_success, score.recovered_accuracy]
        cells = ["" if share is None else f"{100 * share.value:.1f}" for share in shares]
        spent = "" if seconds is None else f"{seconds:.0f}"
        print(f"| {kind} | {name}{kept} | {' | '.join(cells)} | {spent} |", flush=True)

    row("none", model, None)
    for name, method in METHODS.items():
        start = time.process_time()
        result = ub.purify(model, data.clean, method, seed=0, device="cpu", precision="fp32")
        choice = result.record.get("choice")
        kept = "" if choice is None else f" (kept {choice['kept'] or 'the suspect'})"
        row(name, result.model, time.process_time() - start, kept)
        print("\n".join([*result.record["notes"], *result.record["warnings"]]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| victim | method | clean accuracy | attack success | recovered accuracy | processor seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for chosen in sys.argv[1:] or ATTACKS:
        measured(chosen, Digits.drawn())
