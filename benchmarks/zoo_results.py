"""From the zoos of small models to the statistics that `audit` compares with, and to its operating points.

    python benchmarks/zoo_results.py

Reads the audits of two stores, `docs/results/cells/zoo` of images and `docs/results/cells/zoo-texts`, which the grids
of the same names made, and writes

- `src/unbackdoor/_detection/nulls.json`: the scores of the clean models of part `a`;
- `src/unbackdoor/_detection/operating_point.json`: the rates of alarms on all others;
- `docs/results/tables/audit.md` and `audit-texts.md`: the same as tables;
- `docs/assets/roc.svg` and `roc-texts.svg`: ROC curves.

A model whose attack did not implant, or that is more than 3 points less accurate than the clean control of its task
and seed, is in no figure.
"""

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from unbackdoor._detection.nulls import Null
from unbackdoor._detection.result import ALARM
from unbackdoor._inversion.masks import anomaly_index
from unbackdoor._registry.detectors import REGISTRY
from unbackdoor._registry.entries import find
from unbackdoor._tasks.proportion import Proportion
from unbackdoor._value import fields_of

ROOT = Path(__file__).parents[1]
LOST = 0.03  # of clean accuracy, against the control: more, and a victim is in no figure
DRAWS = 2000  # of the bootstrap
LEAST_MODELS = 19  # clean ones: with fewer, no p-value reaches 5 %
AUDIT = f"audit (p at most {ALARM:g})"


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """Models of one kind of data.

    Args:
        modality: of the data.
        name: of the store and, before `-clean` or as it is, of the grid of clean models.
        grid: of the clean models.
        page: of the tables.
        roc: the picture.
        development: the attacks that settings were chosen on.
        data: names of the data sets.
        arch: of the networks, as `audit` names it.
        width: of the networks; None for texts.
        networks: what they are, in words.
    """

    modality: Literal["images", "text"]
    name: str
    grid: str
    page: str
    roc: str
    development: tuple[str, ...]
    data: dict[str, str]
    arch: str
    width: int | None
    networks: str

    @property
    def store(self) -> Path:
        """The folder of its store."""
        return ROOT / "docs/results/cells" / self.name


IMAGES = Zoo(
    modality="images",
    name="zoo",
    grid="zoo-clean",
    page="audit",
    roc="roc",
    development=("badnets", "blended", "sig", "input-aware", "tact"),
    data={
        "digits": "digits of 12x12 pixels",
        "mnist": "MNIST of 14x14 pixels",
        "fashion": "Fashion-MNIST of 14x14 pixels",
    },
    arch="unbackdoor-resnet",
    width=8,
    networks="networks of width 8",
)
TEXTS = Zoo(
    modality="text",
    name="zoo-texts",
    grid="zoo-texts",
    page="audit-texts",
    roc="roc-texts",
    development=("word",),
    data={
        "sst2": "SST-2",
        "hsol": "HSOL",
        "olid": "OLID",
        "amazon_reviews": "Amazon reviews",
        "ag_news": "AG News",
    },
    arch="bert",
    width=None,
    networks="all-MiniLM-L6-v2 tuned on 800 texts",
)


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
        development: whether settings may be chosen on its attack.
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
    development: bool

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
        moved = [1.0 if each["moved"] is None else each["moved"]["value"] for each in classes]
        pairs = zip((each["nominal_p"] for each in classes), moved, strict=True)
        return [pair for pair in pairs if pair[1] >= PROVEN]


def settings(zoo: Zoo) -> dict[str, dict[str, Any]]:
    """The settings, as they are today, of the detectors that a zoo goes through."""
    grid = tomllib.loads((ROOT / f"grids/{zoo.grid}.toml").read_text(encoding="utf-8"))
    names = [table["name"] for table in grid["detectors"]]
    return {name: fields_of(find(name, REGISTRY, "detector", "detectors").resolve()()) for name in names}


def read(zoo: Zoo, wanted: dict[str, dict[str, Any]]) -> list[Model]:
    """The models of a zoo that all wanted detectors went through, with these settings."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    facts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for spec, result in Store(zoo.store).cells():
        if spec["method"]["name"] != "audit" or result["status"] != "done":
            continue
        key = json.dumps([spec["victim"], spec["clean"], spec["seed"]], sort_keys=True)
        facts[key] = spec["victim"], result
        for finding in result["audit"]["findings"]:
            name = finding["detector"]
            used = {key: value for key, value in spec["method"]["parameters"][name].items() if key != "version"}
            if used == wanted.get(name):
                found[key][name] = finding
    return [
        _model(zoo, *facts[key], {name: found[key][name] for name in wanted})
        for key in sorted(facts)
        if found[key].keys() >= wanted.keys()
    ]


def _model(zoo: Zoo, victim: dict[str, Any], result: dict[str, Any], findings: dict[str, dict[str, Any]]) -> Model:
    task = victim["task"]
    data, part = task["name"].split("-")[:2]
    success = result["score"].get("attack_success")
    augment = {"flip": ", mirrored", "none": ", not augmented"}.get(task.get("augment", ""), "")
    return Model(
        data=data,
        task=task["name"],
        recipe=f"{zoo.networks if zoo is TEXTS else task.get('arch', 'resnet18')}, {task['epochs']} epochs{augment}",
        part=part,
        attack="" if victim["attack"]["name"] == "none" else victim["attack"]["name"],
        rate=victim["rate"],
        seed=victim["seed"],
        accuracy=result["score"]["clean_accuracy"]["value"],
        success=None if success is None else success["value"],
        implanted=result["implanted"],
        findings=findings,
        development=victim["attack"]["name"] in zoo.development,
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


def results() -> dict[Path, str]:
    """The files and their content."""
    models: list[CleanModel] = []
    used: dict[str, dict[str, Any]] = {}
    points: list[MeasuredPoint] = []
    pages: dict[Path, str] = {}
    for zoo in (IMAGES, TEXTS):
        of_zoo = Results.of(zoo)
        models += of_zoo.null.models
        used |= of_zoo.settings
        points += of_zoo.points()
        pages[ROOT / f"docs/results/tables/{zoo.page}.md"] = page(of_zoo)
        pages[ROOT / f"docs/assets/{zoo.roc}.svg"] = roc(of_zoo)
    provenance = "benchmarks/zoo_results.py, from docs/results/cells/zoo and docs/results/cells/zoo-texts"
    package = ROOT / "src/unbackdoor/_detection"
    return {
        package / "nulls.json": _text(NullTable(provenance=provenance, detectors=used, models=models)),
        package / "operating_point.json": _text(OperatingPointTable(points=points)),
        **pages,
    }


@dataclass(frozen=True)
class Results:
    """The audits of a zoo.

    Args:
        zoo: which one.
        settings: of its detectors.
        null: the clean models of part `a`.
        clean: those of part `b`.
        attacked: the victims that count.
        left_out: those that do not, with the reason.
        models: all that count, of part `a` too.
    """

    zoo: Zoo
    settings: dict[str, dict[str, Any]]
    null: Null
    clean: list[Model]
    attacked: list[Model]
    left_out: list[tuple[Model, str]]
    models: list[Model]

    @classmethod
    def of(cls, zoo: Zoo) -> "Results":
        """Read the store of a zoo."""
        used = settings(zoo)
        models, left_out = sound(read(zoo, used))
        chosen = [model for model in models if not model.attack and model.part == "a"]
        null = Null(tuple(null_entry(zoo, model, list(used)) for model in chosen), tuple(used), "")
        clean = [model for model in models if not model.attack and model.part == "b"]
        return cls(zoo, used, null, clean, [model for model in models if model.attack], left_out, models)

    @property
    def names(self) -> list[str]:
        """The names of its detectors."""
        return list(self.settings)

    @property
    def development(self) -> list[Model]:
        """The victims of attacks that settings were chosen on."""
        return [model for model in self.attacked if model.development]

    @property
    def held_out(self) -> list[Model]:
        """The victims of other attacks."""
        return [model for model in self.attacked if not model.development]

    def points(self) -> list[MeasuredPoint]:
        """The measured rates; none if there are too few models."""
        if len(self.null.models) < LEAST_MODELS or not self.clean or not self.held_out:
            return []
        alarm = rules(self.names, self.null)[AUDIT]
        data = ", ".join(sorted({self.zoo.data[model.data] for model in self.clean}))
        kinds = len({model.attack for model in self.held_out})
        return [
            MeasuredPoint(
                detectors=self.settings,
                modality=self.zoo.modality,
                false_alarms=_proportion([alarm(model) for model in self.clean]),
                detections=_proportion([alarm(model) for model in self.held_out]),
                models=f"{len(self.clean)} clean models, and {len(self.held_out)} with a backdoor of {kinds} kinds "
                f"that no setting was chosen on; {self.zoo.networks}, trained on {data}",
            )
        ]


def roc(audits: Results) -> str:
    """The picture of the ROC curves: all detectors together on both groups of attacks, and other rules as dots."""
    groups = {"audit, held-out kinds": audits.held_out, "audit, development kinds": audits.development}
    good = [model.largest(audits.names) for model in audits.clean]
    curves = {
        f"{name} ({len(group)} models)": curve(good, [model.largest(audits.names) for model in group])
        for name, group in groups.items()
        if good and group
    }
    dots = {
        f"{name.replace('`', '')}, all kinds": (_rate(alarm, audits.clean), _rate(alarm, audits.attacked))
        for name, alarm in rules(audits.names, audits.null).items()
        if name != AUDIT and audits.clean and audits.attacked
    }
    return picture(f"ROC curves of audits of {len(audits.clean)} clean models", curves, dots)


def _rate(alarm: Callable[[Model], bool], models: list[Model]) -> float:
    return sum(map(alarm, models)) / len(models)


def null_entry(zoo: Zoo, model: Model, names: Sequence[str]) -> CleanModel:
    """A clean model, as the package keeps it."""
    return CleanModel(
        arch=zoo.arch,
        width=zoo.width,
        data=zoo.data[model.data],
        modality=zoo.modality,
        classes=len(next(iter(model.findings.values()))["classes"]),
        recipe=model.recipe,
        seed=model.seed,
        accuracy=round(model.accuracy, 4),
        scores={name: round(model.score(name), 4) for name in names},
    )


def _proportion(flags: Sequence[bool]) -> ProportionEntry:
    return ProportionEntry.model_validate(Proportion(sum(flags), len(flags)).to_json())


def _text(content: BaseModel) -> str:
    return json.dumps(content.model_dump(mode="json"), indent=1) + "\n"


def page(audits: Results) -> str:
    """The tables."""
    names, null = audits.names, audits.null
    lines = [
        f"# Audits of the zoo of small models: {audits.zoo.modality}",
        "",
        "Written by `python benchmarks/zoo_results.py`; [audit.md](../audit.md) explains it.",
        "",
        f"{len(null.models)} clean models give the statistics (part a), {len(audits.clean)} others are reported on "
        f"(part b). Of {len(audits.attacked) + len(audits.left_out)} victims, {len(audits.left_out)} are in no figure. "
        "Intervals are exact (95 %).",
        "",
        "| rule | false alarms, other clean models | detected, development kinds | detected, held-out kinds |",
        "| --- | --- | --- | --- |",
    ]
    known = rules(names, null)
    groups = (audits.clean, audits.development, audits.held_out)
    for rule, alarm in known.items():
        lines.append(f"| {rule} | " + " | ".join(share([alarm(model) for model in group]) for group in groups) + " |")
    lines += ["", *_areas(*groups, names), "", *_nominal(audits.clean, names, null)]
    lines += ["", f"| attack | kinds | victims | {' | '.join(known)} |", "| --- " * (3 + len(known)) + "|"]
    for kind in sorted(
        {model.attack for model in audits.attacked}, key=lambda kind: (kind not in audits.zoo.development, kind)
    ):
        mine = [model for model in audits.attacked if model.attack == kind]
        hits = " | ".join(f"{sum(map(alarm, mine))} of {len(mine)}" for alarm in known.values())
        lines.append(f"| {kind} | {'development' if mine[0].development else 'held-out'} | {len(mine)} | {hits} |")
    lines += ["", *_seconds(audits.models, names), "", *_every(audits.models, names, null)]
    if audits.left_out:
        lines += ["", "In no figure:", ""]
        lines += [f"- {model.task}, {model.attack} {100 * model.rate:g} %: {why}." for model, why in audits.left_out]
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
    for path, text in results().items():
        path.write_text(text, encoding="utf-8")
