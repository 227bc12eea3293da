"""From the zoo of small models to the statistics that `audit` compares with, and to its operating point.

    python benchmarks/zoo_results.py docs/results/cells/zoo

Reads the audits of a store that `grids/zoo-clean.toml` and `grids/zoo-attacks.toml` made, and writes

- `src/unbackdoor/_detection/nulls.json`: the scores of the clean models of part `a`;
- `src/unbackdoor/_detection/operating_point.json`: the rates of alarms on all others;
- `docs/results/tables/audit.md`: the same as tables;
- `docs/assets/roc.svg`: ROC curves.

A model whose attack did not implant, or that is more than 3 points less accurate than the clean control of its task
and seed, is in no figure.
"""

import json
import math
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from scipy.stats import gamma

from roc_picture import curve, picture
from unbackdoor._artifacts.entries import ProportionEntry
from unbackdoor._artifacts.null_table import CleanModel, NullTable
from unbackdoor._artifacts.operating_point import MeasuredPoint, OperatingPointTable
from unbackdoor._bench import Store
from unbackdoor._detection.judging import PROVEN, ExactShare
from unbackdoor._detection.nulls import Null, measured, shipped
from unbackdoor._detection.outliers import outlier_p_values
from unbackdoor._detection.result import ALARM
from unbackdoor._inversion.masks import anomaly_index
from unbackdoor._registry.detectors import REGISTRY
from unbackdoor._registry.entries import find
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._value import fields_of

ROOT = Path(__file__).parents[1]
DEVELOPMENT = ("badnets", "blended", "sig", "input-aware", "tact")  # settings were chosen on these kinds of attacks
LOST = 0.03  # of clean accuracy, against the control: more, and a victim is in no figure
DRAWS = 2000  # of the bootstrap
LEAST_MODELS = 19  # clean ones: with fewer, no p-value reaches 5 %
DATA = {
    "digits": "digits of 12x12 pixels",
    "mnist": "MNIST of 14x14 pixels",
    "fashion": "Fashion-MNIST of 14x14 pixels",
}
AUDIT = f"audit (p at most {ALARM:g})"


@dataclass(frozen=True)
class Model:
    """A model of the zoo and its audit.

    Args:
        data: the name of its data set.
        task: the name of its task, which says the part of the data and the recipe.
        recipe: its network and its training, in words.
        part: `a` or `b`.
        attack: the kind; empty for a clean model.
        rate: poisoned share.
        seed: of its training.
        accuracy: on the test examples.
        success: of the attack; None for a clean model.
        implanted: whether the attack did; None for a clean model.
        findings: by detector.
    """

    data: str
    task: str
    recipe: str
    part: str
    attack: str
    rate: float
    seed: int
    accuracy: float
    success: float | None
    implanted: bool | None
    findings: dict[str, dict[str, Any]]

    def score(self, detector: str) -> float:
        """-log10 of the smallest nominal p-value of a class whose shortcut the held-out examples confirm."""
        return max((abs(math.log10(max(p, 1e-300))) for p, _ in self._confirmed(detector)), default=0.0)

    def largest(self, names: Sequence[str]) -> tuple[float, float]:
        """The largest score over some detectors, and the share that its shortcut moves, which breaks ties."""
        scores = [(self.score(name), max((moved for _, moved in self._confirmed(name)), default=0.0)) for name in names]
        return max(scores)

    def seconds(self) -> float:
        """Of all searches together."""
        return sum(finding["seconds"] for finding in self.findings.values())

    def _confirmed(self, detector: str) -> list[tuple[float, float]]:
        """Nominal p-value and moved share of the classes whose shortcut is proven."""
        classes = self.findings[detector]["classes"]
        nominal = outlier_p_values(torch.tensor([each["strength"] for each in classes])).tolist()
        moved = [1.0 if each["moved"] is None else each["moved"]["value"] for each in classes]
        return [pair for pair in zip(nominal, moved, strict=True) if pair[1] >= PROVEN]


def settings() -> dict[str, dict[str, Any]]:
    """The settings, as they are today, of the detectors that the zoo goes through."""
    grid = tomllib.loads((ROOT / "grids/zoo-clean.toml").read_text(encoding="utf-8"))
    names = [table["name"] for table in grid["detectors"]]
    return {name: fields_of(find(name, REGISTRY, "detector", "detectors").resolve()()) for name in names}


def read(store: Store, wanted: dict[str, dict[str, Any]]) -> list[Model]:
    """The models that all wanted detectors went through, with these settings."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    facts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for spec, result in store.cells():
        if spec["method"]["name"] != "audit" or result["status"] != "done":
            continue
        key = json.dumps([spec["victim"], spec["clean"], spec["seed"]], sort_keys=True)
        facts[key] = spec["victim"], result
        for finding in result["audit"]["findings"]:
            name = finding["detector"]
            used = {**spec["method"]["parameters"][name]}
            used.pop("version")
            if used == wanted.get(name):
                found[key][name] = finding
    return [
        _model(*facts[key], {name: found[key][name] for name in wanted})
        for key in sorted(facts)
        if found[key].keys() >= wanted.keys()
    ]


def _model(victim: dict[str, Any], result: dict[str, Any], findings: dict[str, dict[str, Any]]) -> Model:
    task = victim["task"]
    data, part = task["name"].split("-")[:2]
    success = result["score"].get("attack_success")
    augment = {"flip": ", mirrored", "none": ", not augmented"}.get(task.get("augment", ""), "")
    return Model(
        data=data,
        task=task["name"],
        recipe=f"{task.get('arch', 'resnet18')}, {task['epochs']} epochs{augment}",
        part=part,
        attack="" if victim["attack"]["name"] == "none" else victim["attack"]["name"],
        rate=victim["rate"],
        seed=victim["seed"],
        accuracy=result["score"]["clean_accuracy"]["value"],
        success=None if success is None else success["value"],
        implanted=result["implanted"],
        findings=findings,
    )


def sound(models: list[Model]) -> tuple[list[Model], list[tuple[Model, str]]]:
    """The models that figures are made of, and the victims that are in none, with the reason."""
    controls = {(model.task, model.seed): model.accuracy for model in models if not model.attack}
    kept, left_out = [], []
    for model in models:
        control = controls.get((model.task, model.seed))
        if not model.attack:
            kept.append(model)
        elif not model.implanted:
            left_out.append((model, f"it did not implant: attack success {model.success:.1%}"))
        elif control is None:
            left_out.append((model, "its control was not measured"))
        elif control - model.accuracy > LOST:
            left_out.append((model, f"it lost {100 * (control - model.accuracy):.1f} points of accuracy"))
        else:
            kept.append(model)
    return kept, left_out


def area(clean: Sequence[tuple[float, ...]], attacked: Sequence[tuple[float, ...]]) -> float:
    """The area under the ROC curve: the probability that a model with a backdoor has the larger score.

    >>> area([(0.0, 1.0), (1.0, 0.0)], [(1.0, 0.0), (2.0, 0.0)])
    0.875
    """
    wins = sum((bad > good) + (bad == good) / 2 for bad in attacked for good in clean)
    return wins / (len(clean) * len(attacked))


def area_interval(clean: list[tuple[float, ...]], attacked: dict[str, list[tuple[float, ...]]]) -> tuple[float, float]:
    """A 95 % interval of the area: whole kinds of attacks are drawn again, and clean models one by one."""
    random = np.random.default_rng(0)
    kinds = sorted(attacked)
    areas = []
    for _ in range(DRAWS):
        drawn = [score for place in random.integers(len(kinds), size=len(kinds)) for score in attacked[kinds[place]]]
        areas.append(area([clean[place] for place in random.integers(len(clean), size=len(clean))], drawn))
    low, high = np.quantile(areas, [0.025, 0.975])
    return float(low), float(high)


def share(flags: Sequence[bool]) -> str:
    """A share with its exact interval, as the tables show it."""
    exact = ExactShare(sum(flags), len(flags))
    if not flags:
        return "none measured"
    low, high = exact.interval
    return f"{exact.count} of {exact.n} ({100 * low:.1f} to {100 * high:.1f} %)"


def rules(names: Sequence[str], null: Null) -> dict[str, Callable[[Model], bool]]:
    """Rules that raise an alarm on a model."""
    known: dict[str, Callable[[Model], bool]] = {AUDIT: lambda model: null.p_value(model.largest(names)[0]) <= ALARM}
    if "patch" in names:
        known["Neural Cleanse's (anomaly index above 2)"] = lambda model: bool(
            (anomaly_index(torch.tensor([each["size"] for each in model.findings["patch"]["classes"]])) > 2).any()
        )
    if "margin" in names:
        known["MM-BD's (gamma, p below 0.05), on the margins of `margin`"] = lambda model: (
            margin_p([math.exp(each["strength"]) for each in model.findings["margin"]["classes"]]) < 0.05
        )
    return known


def margin_p(margins: list[float]) -> float:
    """MM-BD's p-value: 1 - F(largest)^C, with a gamma distribution F that is fitted to the other C - 1 margins.

    Its authors raise margins from random pictures; these are raised from inner features of clean ones.
    """
    *others, largest = sorted(margins)
    return float(1 - gamma.cdf(largest, *gamma.fit(others)) ** len(margins))


def results(folder: Path) -> dict[Path, str]:
    """The four files and their content; what the two of the package say about texts stays."""
    used = settings()
    models, left_out = sound(read(Store(folder), used))
    chosen = [model for model in models if not model.attack and model.part == "a"]
    others = [model for model in models if not model.attack and model.part == "b"]
    held_out = [model for model in models if model.attack and model.attack not in DEVELOPMENT]
    null = Null(tuple(null_entry(model, list(used)) for model in chosen), tuple(used), "")
    kept, rates = shipped(), [point for point in measured().points if point.modality != "images"]
    texts = [model for model in kept.models if model.modality != "images"]
    names = {name for model in texts for name in model.scores}
    table = NullTable(
        provenance="benchmarks/zoo_results.py, from docs/results/cells/zoo",
        detectors={**{name: given for name, given in kept.detectors.items() if name in names}, **used},
        models=[*null.models, *texts],
    )
    if len(null.models) >= LEAST_MODELS and others and held_out:
        rates.insert(0, _rates(others, held_out, used, null))
    package = ROOT / "src/unbackdoor/_detection"
    return {
        package / "nulls.json": _text(table),
        package / "operating_point.json": _text(OperatingPointTable(points=rates)),
        ROOT / "docs/results/tables/audit.md": page(models, left_out, list(used), null),
        ROOT / "docs/assets/roc.svg": roc(others, [model for model in models if model.attack], list(used), null),
    }


def roc(clean: list[Model], attacked: list[Model], names: list[str], null: Null) -> str:
    """The picture of the ROC curves: all detectors together on both groups of attacks, and other rules as dots."""
    groups = {
        "audit, held-out kinds": [model for model in attacked if model.attack not in DEVELOPMENT],
        "audit, development kinds": [model for model in attacked if model.attack in DEVELOPMENT],
    }
    good = [model.largest(names) for model in clean]
    curves = {
        f"{name} ({len(group)} models)": curve(good, [model.largest(names) for model in group])
        for name, group in groups.items()
        if good and group
    }
    dots = {
        f"{name.replace('`', '')}, all kinds": (_rate(alarm, clean), _rate(alarm, attacked))
        for name, alarm in rules(names, null).items()
        if name != AUDIT and clean and attacked
    }
    return picture(f"ROC curves of audits of {len(clean)} clean models", curves, dots)


def _rate(alarm: Callable[[Model], bool], models: list[Model]) -> float:
    return sum(map(alarm, models)) / len(models)


def null_entry(model: Model, names: Sequence[str]) -> CleanModel:
    """A clean model, as the package keeps it."""
    return CleanModel(
        arch="unbackdoor-resnet",
        width=8,
        data=DATA[model.data],
        modality="images",
        classes=len(next(iter(model.findings.values()))["classes"]),
        recipe=model.recipe,
        seed=model.seed,
        accuracy=round(model.accuracy, 4),
        scores={name: round(model.score(name), 4) for name in names},
    )


def _rates(clean: list[Model], attacked: list[Model], used: dict[str, dict[str, Any]], null: Null) -> MeasuredPoint:
    alarm = rules(list(used), null)[AUDIT]
    data = ", ".join(sorted({DATA[model.data] for model in clean}))
    kinds = len({model.attack for model in attacked})
    return MeasuredPoint(
        detectors=used,
        modality="images",
        false_alarms=_proportion([alarm(model) for model in clean]),
        detections=_proportion([alarm(model) for model in attacked]),
        models=f"{len(clean)} clean models, and {len(attacked)} with a backdoor of {kinds} kinds that no setting was "
        f"chosen on; networks of width 8, trained on {data}",
    )


def _proportion(flags: Sequence[bool]) -> ProportionEntry:
    return ProportionEntry.model_validate(Proportion(sum(flags), len(flags)).to_json())


def _text(content: BaseModel) -> str:
    return json.dumps(content.model_dump(mode="json"), indent=1) + "\n"


def page(models: list[Model], left_out: list[tuple[Model, str]], names: list[str], null: Null) -> str:
    """The tables."""
    clean = [model for model in models if not model.attack and model.part == "b"]
    attacked = [model for model in models if model.attack]
    held_out = [model for model in attacked if model.attack not in DEVELOPMENT]
    lines = [
        "# Audits of the zoo of small models",
        "",
        "Written by `python benchmarks/zoo_results.py docs/results/cells/zoo`; [audit.md](../audit.md) explains it.",
        "",
        f"{len(null.models)} clean models give the statistics (part a), {len(clean)} others are reported on (part b). "
        f"Of {len(attacked) + len(left_out)} victims, {len(left_out)} are in no figure. Intervals are exact (95 %).",
        "",
        "| rule | false alarms, other clean models | detected, development kinds | detected, held-out kinds |",
        "| --- | --- | --- | --- |",
    ]
    development = [model for model in attacked if model.attack in DEVELOPMENT]
    known = rules(names, null)
    groups = (clean, development, held_out)
    for rule, alarm in known.items():
        lines.append(f"| {rule} | " + " | ".join(share([alarm(model) for model in group]) for group in groups) + " |")
    lines += ["", *_areas(clean, development, held_out, names), "", *_nominal(clean, names, null)]
    lines += ["", f"| attack | kinds | victims | {' | '.join(known)} |", "| --- " * (3 + len(known)) + "|"]
    for kind in sorted({model.attack for model in attacked}, key=lambda kind: (kind not in DEVELOPMENT, kind)):
        mine = [model for model in attacked if model.attack == kind]
        hits = " | ".join(f"{sum(map(alarm, mine))} of {len(mine)}" for alarm in known.values())
        group = "development" if kind in DEVELOPMENT else "held-out"
        lines.append(f"| {kind} | {group} | {len(mine)} | {hits} |")
    lines += ["", *_seconds(models, names), "", *_every(models, names, null)]
    if left_out:
        lines += ["", "In no figure:", ""]
        lines += [f"- {model.task}, {model.attack} {100 * model.rate:g} %: {why}." for model, why in left_out]
    return "\n".join(lines) + "\n"


def _areas(clean: list[Model], development: list[Model], held_out: list[Model], names: list[str]) -> list[str]:
    lines = [
        "| score | AUC, development kinds | AUC, held-out kinds |",
        "| --- | --- | --- |",
    ]
    for title, chosen in (("largest of all detectors", names), *((name, [name]) for name in names)):
        cells = []
        for group in (development, held_out):
            if not clean or not group:
                cells.append("none measured")
                continue
            by_kind: dict[str, list[tuple[float, ...]]] = defaultdict(list)
            for model in group:
                by_kind[model.attack].append(model.largest(chosen))
            good = [model.largest(chosen) for model in clean]
            value = area(good, [score for scores in by_kind.values() for score in scores])
            low, high = area_interval(good, by_kind)
            cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, "", "Intervals of AUC: bootstrap that draws whole kinds of attacks, and clean models."]


def _nominal(clean: list[Model], names: list[str], null: Null) -> list[str]:
    lines = ["| p at most | alarms on other clean models | before calibration, with Bonferroni over detectors |"]
    lines.append("| --- | --- | --- |")
    for level in (0.05, 0.1, 0.25, 0.5):
        scores = [model.largest(names)[0] for model in clean]
        after = [null.p_value(score) <= level for score in scores]
        before = [len(names) * 10**-score <= level for score in scores]
        lines.append(f"| {level:g} | {share(after)} | {share(before)} |")
    return lines


def _seconds(models: list[Model], names: list[str]) -> list[str]:
    lines = ["| detector | seconds, median (largest) |", "| --- | --- |"]
    for name in names:
        taken = sorted(model.findings[name]["seconds"] for model in models)
        if taken:
            lines.append(f"| {name} | {taken[len(taken) // 2]:.0f} ({taken[-1]:.0f}) |")
    return lines


def _every(models: list[Model], names: list[str], null: Null) -> list[str]:
    lines = [f"| model | accuracy | attack success | {' | '.join(names)} | p |", "| --- " * (len(names) + 4) + "|"]
    for model in sorted(models, key=lambda each: (each.part, each.attack, each.task, each.rate, each.seed)):
        what = f"{model.attack} {100 * model.rate:g} %" if model.attack else "clean"
        success = "" if model.success is None else f"{100 * model.success:.1f}"
        scores = " | ".join(f"{model.score(name):.2f}" for name in names)
        given = "" if model.part == "a" else f"{null.p_value(model.largest(names)[0]):.3f}"
        lines.append(
            f"| {model.task}, {what}, seed {model.seed} | {100 * model.accuracy:.1f} | {success} | {scores} | {given} |"
        )
    return ["Each model, with the score of each detector (-log10 of its nominal p-value):", "", *lines]


if __name__ == "__main__":
    for path, text in results(Path(sys.argv[1])).items():
        path.write_text(text, encoding="utf-8")
