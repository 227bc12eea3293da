"""Measures what each rule of choosing Fine-mixing's rho costs on a text suspect, over a thousand draws of 64 texts.

    python benchmarks/choice_of_rho.py MODEL --base BASE --data TEST [--data MORE] --triggered TRIGGERED --target 1 \
        --out answers.pt

The suspect is mixed and tuned once at each rho, on 64 texts. All others are answered once. Then 64 of these are drawn
again and again to stand for the held-out texts of a cross-validation: a rule sees the loss of each rho on them, and
its cost is the loss on all texts of the rho that it chooses. The search is by halving, as in the method, over these
rho.

`beliefs` uses no labels for the loss: the suspect's answers, at the temperature that fits the 64 labels best, estimate
the cost of a different answer. It is not a part of the method; docs/results/fine-mixing.md explains why.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unbackdoor import Dataset, load, purify
from unbackdoor._models.arithmetic import choose
from unbackdoor._models.loading import load_base
from unbackdoor._tasks.classification import answers
from unbackdoor.purifiers import FineMixing

RHOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
MARGIN, CLEAN, DRAWS = 0.03, 64, 1000
TEMPERATURES = [2.0 ** (quarter / 4) for quarter in range(-12, 21)]

RULES: dict[str, Callable[[float, float], bool]] = {
    "one standard error excuses (version 1)": lambda lost, error: lost - (error if error > MARGIN else 0) <= MARGIN,
    "one standard error, at most the margin": lambda lost, error: lost - min(error, MARGIN) <= MARGIN,
    "the best guess (version 2)": lambda lost, _error: round(lost * CLEAN) <= MARGIN * CLEAN + 0.5,
    "the best guess, not rounded": lambda lost, _error: lost <= MARGIN,
}


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """The answers of the suspect and of what each rho makes of it."""
    suspect, encode = load(given.model, max_length=given.max_length)
    base = load_base(given.base)
    clean, rest = Dataset.load(given.data, encode).split(CLEAN, seed=0)
    order = np.random.default_rng(0)
    test = rest.select(order.permutation(len(rest))[: given.texts].tolist())
    triggered = Dataset.load(given.triggered, encode)
    triggered = triggered.select(order.permutation(len(triggered))[:250].tolist())
    arithmetic = choose(suspect, "cpu", "fp32")

    def answered(model: Any) -> dict[str, Tensor]:
        return {"test": answers(model, test, arithmetic), "triggered": answers(model, triggered, arithmetic)}

    found: dict[str, Any] = {"labels": test.labels, "target": given.target, "suspect": answered(suspect), "rho": {}}
    for rho in RHOS:
        model = purify(suspect, clean, FineMixing(rho=rho), base=base, device="cpu", precision="fp32").model
        found["rho"][rho] = answered(model)
        print(f"rho {rho:g} is done", flush=True)
        torch.save(found, given.out)
    return found


def halved(losses: dict[float, tuple[float, float]], passes: Callable[[float, float], bool]) -> float:
    """The rho that a search by halving takes."""
    rhos = sorted(losses)
    low, high = 0, len(rhos) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(*losses[rhos[middle]]) else (middle + 1, high)
    return rhos[low]


def differences(gaps: Tensor) -> tuple[float, float]:
    """The mean loss and its standard error, at least that of one example."""
    return float(gaps.mean()), max(float(gaps.std() / len(gaps) ** 0.5), 1 / len(gaps))


def print_rules(found: dict[str, Any]) -> None:
    """Print what is true of each rho, what 64 texts say of it, and what each rule costs."""
    labels, suspect = found["labels"], found["suspect"]["test"].double()
    right = (suspect.argmax(dim=1) == labels).double()
    answered = {rho: made["test"].argmax(dim=1) for rho, made in found["rho"].items()}
    lost = {rho: right - (chosen == labels).double() for rho, chosen in answered.items()}
    moved = {
        rho: float((made["triggered"].argmax(dim=1) == found["target"]).double().mean())
        for rho, made in found["rho"].items()
    }
    before = float((found["suspect"]["triggered"].argmax(dim=1) == found["target"]).double().mean())
    print(f"suspect: {right.mean():.1%} of {len(labels)} right, {before:.1%} of the triggered moved")
    misfit = torch.stack([F.cross_entropy(suspect / each, labels, reduction="none") for each in TEMPERATURES])
    random = np.random.default_rng(0)
    said: dict[str, dict[float, list[tuple[float, float]]]] = {
        kind: {rho: [] for rho in lost} for kind in ("labels", "beliefs")
    }
    taken: dict[str, list[float]] = {rule: [] for rule in RULES}
    for _ in range(DRAWS):
        rows = torch.from_numpy(random.choice(len(labels), CLEAN, replace=False))
        likely = (suspect[rows] / TEMPERATURES[int(misfit[:, rows].mean(dim=1).argmin())]).softmax(dim=1)
        for rho in lost:
            said["labels"][rho].append(differences(lost[rho][rows]))
            own = likely.gather(1, answered[rho][rows][:, None])[:, 0]
            said["beliefs"][rho].append(differences(likely.amax(dim=1) - own))
        losses = {rho: said["labels"][rho][-1] for rho in lost}
        for rule, passes in RULES.items():
            taken[rule].append(halved(losses, passes))
    print("| rho | lost | attack success | by labels | by beliefs |\n| --- | --- | --- | --- | --- |")
    for rho in sorted(lost):
        columns = []
        for kind in ("labels", "beliefs"):
            mean, claimed = np.array(said[kind][rho]).mean(axis=0)
            spread = np.array(said[kind][rho])[:, 0].std()
            columns.append(f"{100 * mean:.1f}, spread {100 * spread:.1f}, claimed {100 * claimed:.1f}")
        print(f"| {rho:g} | {100 * float(lost[rho].mean()):.1f} | {100 * moved[rho]:.1f} | {' | '.join(columns)} |")
    print("| rule | lost, mean | 90th percentile | attack success, mean |\n| --- | --- | --- | --- |")
    for rule, chosen in taken.items():
        costs = 100 * np.array([float(lost[rho].mean()) for rho in chosen])
        success = 100 * np.mean([moved[rho] for rho in chosen])
        print(f"| {rule} | {costs.mean():.1f} | {np.quantile(costs, 0.9):.1f} | {success:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--triggered", required=True)
    parser.add_argument("--target", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--texts", type=int, default=900)
    parser.add_argument("--out", required=True, help="file of the answers; if it exists, the rules are measured on it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print_rules(torch.load(given.out, weights_only=True) if Path(given.out).exists() else measured(given))


if __name__ == "__main__":
    main()
