"""Measures how a purifier changes the same function with other weights.

    python benchmarks/rescaling.py [METHOD ...]

A network of two convolutions learns scikit-learn's digits, a tenth of which carry a bright corner and the label 3. The
victim is purified as it is, and twice more after its head's weight was divided by c and the head's input multiplied
by it (c = 1/8 and 8, a module without parameters): the three compute the same. The script prints clean accuracy and
attack success of each, in %. A method whose lines differ much depends on a scale that belongs to the victim.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from unbackdoor import Dataset, ImageEncoder, attacks, evaluate, poison, purifiers, purify
from unbackdoor._registry.entries import find

METHODS = ["fine-tuning", "linear-probing", "ft-init", "fst", "shift-distillation", "fine-pruning", "ft-sam", "nad"]
METHODS += ["i-bau", "sau", "anp", "rnp", "clp", "bna", "neural-cleanse", "pam", "trigger-distillation", "bti-dbf"]
PATCH = attacks.BadNets(size=2, margin=0, target=3)


class Times(nn.Module):
    """Multiply by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """The product."""
        return self.factor * features


def network(factor: float = 1.0) -> nn.Sequential:
    """Two convolutions with BatchNorm, average pooling, and a head whose input is multiplied by a factor."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), Times(factor), nn.Linear(128, 10))


def rescaled(victim: nn.Sequential, factor: float) -> nn.Sequential:
    """The same function with a head that is smaller by a factor."""
    made = network(factor).eval()
    made.load_state_dict(victim.state_dict())
    with torch.no_grad():
        made[-1].weight.div_(factor)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=METHODS)
    torch.set_num_threads(1)
    raw = load_digits()
    digits = Dataset(
        items=torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8).unsqueeze(1),
        labels=torch.from_numpy(raw.target).long(),
        encode=ImageEncoder(mean=(0.3,), std=(0.37,), channels=1),
    )
    clean, rest = digits.split(300, seed=0)
    test, training = rest.split(500, seed=0)
    torch.manual_seed(0)
    tuning = purifiers.FineTuning(epochs=15, learning_rate=0.05, batch_size=32)
    poisoned = poison(training, PATCH, rate=0.1, seed=0, classes=10).data
    victim = purify(network().eval(), poisoned, tuning, precision="fp32").model
    assert isinstance(victim, nn.Sequential)
    print(f"{'head divided by':22}{'1/8':>14}{'1':>14}{'8':>14}")
    shown = {factor: rescaled(victim, factor) for factor in (0.125, 1.0, 8.0)}
    for name in ("none", *parser.parse_args().methods):
        line = f"{name:22}"
        for model in shown.values():
            if name != "none":
                method = find(name, purifiers.REGISTRY, "purifier", "methods").resolve()()
                model = purify(model, clean, method, precision="fp32").model
            score = evaluate(model, test, attack=PATCH, precision="fp32")
            assert score.attack_success is not None
            line += f"{100 * score.clean_accuracy.value:7.1f} /{100 * score.attack_success.value:5.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
