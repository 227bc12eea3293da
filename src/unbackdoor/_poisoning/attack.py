"""Planting a backdoor in data: which examples, which labels, how many; and triggering test data.

What a trigger looks like is the attack's own business (`unbackdoor.attacks`). Everything that is the same for all of
them is here: the draw of rows, the label rule, rounding to 8 bits, who counts as attacked, and `attack.json`.
"""

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset, Items
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import MEBIBYTE, RECORD, check_file, exists, read_file, read_json, reader
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._registry.attacks import REGISTRY
from unbackdoor._registry.entries import find, to_json

logger = logging.getLogger("unbackdoor")

LabelRule = Literal["all-to-one", "all-to-all", "clean-label"]

FORMAT = 1  # of attack.json

_ARRAYS = 1024 * MEBIBYTE  # of a trigger: a few pictures or texts


@runtime_checkable
class Attack(Protocol):
    """What an attack must have: a frozen value with these two fields and two functions.

    It may also have `modality` (`images` by default, or `text`); `rules`, the label rules that its trigger can have
    (all by default); `craft`, the train-time form of the trigger where that differs from `apply`; `cover`, for examples
    that carry a distorted trigger and keep their label (as many as `cover_ratio` times the poisoned ones); `sources`,
    the only classes that are poisoned and that count as attacked, and `cover_classes`, those that cover examples come
    from (empty or absent: all, but with `sources` neither these nor the target); `fit`, where the trigger is made with
    the help of the data and of a surrogate (`needs_surrogate`); and `implant`, where the attacker trains the model in a
    way of his own. Where `fit` or `implant` decide what the trigger looks like, `learnt` is true. An attack on text may
    have `side`: which text of a pair carries the trigger, `a` (the default), `b` or `both`.
    """

    @property
    def target(self) -> int:
        """The class that the attacker wants."""

    @property
    def label_rule(self) -> LabelRule:
        """How poisoned examples are labelled."""

    def arrays(self, shape: Any) -> dict[str, Tensor]:
        """What the trigger is made of, for images of shape (channels, height, width); for texts of shape ()."""

    def apply(self, pixels: Any, arrays: dict[str, Tensor]) -> Any:
        """Put the trigger on pixels in [0, 1], (batch, channels, height, width); or on a list of texts."""


class Crafting(NamedTuple):
    """What `craft` (the train-time form of a trigger) and `fit` (the trigger itself) may use.

    Args:
        data: the clean training data.
        rows: the rows to poison.
        surrogate: a clean model of the attacker's, for attacks that declare `needs_surrogate`.
        generator: randomness.
    """

    data: Dataset
    rows: Tensor
    surrogate: nn.Module | None
    generator: torch.Generator


class Planting(NamedTuple):
    """What `implant` of an attack has at hand: it returns the victim, and the arrays of the trigger as they ended up.

    Args:
        clean: the training data as it was.
        poisoned: the same with the backdoor planted.
        fresh: makes an untrained model, or the pre-trained one with a new head; always the same one.
        train: trains a model in place and returns it, in eval mode, by the recipe of the victims:
            `train(model, data, loss=..., change=..., epochs=..., learning_rate=..., after_step=..., description=...)`,
            where what is left out is as the user asked (see `unbackdoor._training.descent.descend`). Only parameters
            that require gradients are trained.
        generator: randomness.
        arithmetic: device, precision, layout (`unbackdoor._models.arithmetic.Arithmetic`).
    """

    clean: Dataset
    poisoned: "Poisoned"
    fresh: Callable[[], nn.Module]
    train: Callable[..., nn.Module]
    generator: torch.Generator
    arithmetic: Any


class Implanted(NamedTuple):
    """What `implant` returns."""

    model: nn.Module
    arrays: dict[str, Tensor]


@dataclass(frozen=True)
class Trigger:
    """An attack together with the arrays that its trigger is made of."""

    attack: Attack
    arrays: dict[str, Tensor]

    @classmethod
    def of(cls, attack: Attack, data: Dataset) -> "Trigger":
        """The trigger of an attack on texts, or on images of the shape of `data`.

        Raises:
            UnbackdoorError: the attack is for data of another kind, or its trigger cannot be made for that shape.
        """
        _check_modality(attack, data)
        return cls(attack, attack.arrays(data.shape))

    def stamp(self, items: Items) -> Items:
        """Trigger uint8 images (n, channels, height, width), rounded to 8 bits as exported pictures are; or texts."""
        if isinstance(items, Texts):
            return stamped_texts(items, self.attack, lambda texts: self.attack.apply(texts, self.arrays))
        return stamped(items, lambda pixels: self.attack.apply(pixels, self._on(pixels.device)))

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: array.to(device) for name, array in self.arrays.items()}


def stamped(items: Tensor, change: Any, chunk: int = 128) -> Tensor:
    """Apply a function of pixels in [0, 1] to uint8 images, in chunks that fit a cache, and round to 8 bits."""
    if len(items) == 0:
        return items
    parts = [change(part.float() / 255).mul(255).round().clamp(0, 255).to(torch.uint8) for part in items.split(chunk)]
    return torch.cat(parts)


def stamped_texts(items: Texts, attack: Attack, change: Callable[[list[str]], list[str]]) -> Texts:
    """Apply a function of a list of texts to the side of each pair that the attack is on; not yet tokenised."""
    side = getattr(attack, "side", "a")
    columns = [list(column) for column in zip(*items.strings, strict=True)]
    if side == "b" and columns and len(columns) < 2:
        raise UnbackdoorError(f"{type(attack).__name__}.side is b, but the data holds single texts. Use side a.")
    for place in range(len(columns)):
        if side == "both" or place == "ab".index(side):
            columns[place] = change(columns[place])
    return Texts(tuple(zip(*columns, strict=True)), items.columns)


def _replaced(items: Items, rows: Tensor, new: Items) -> Items:
    """The items with some rows taken from others."""
    if isinstance(items, Texts):
        assert isinstance(new, Texts)
        return items.replaced(rows, new)
    assert isinstance(new, Tensor)
    changed = items.clone()
    changed[rows] = new
    return changed


class Poisoned(NamedTuple):
    """Training data with a backdoor, and how it came about.

    Args:
        data: all rows, the poisoned ones changed.
        rows: the poisoned rows, sorted.
        cover: rows with a distorted trigger and their own label, sorted.
        trigger: what was put on them.
    """

    data: Dataset
    rows: Tensor
    cover: Tensor
    trigger: Trigger


class Triggered(NamedTuple):
    """Test data with the trigger on, only of classes that the attack is meant to move.

    Args:
        data: triggered items with their true labels.
        wanted: what the attacker wants each to be taken for, (n,).
        label_rule: of the attack.
        target: of the attack; None for all-to-all.
    """

    data: Dataset
    wanted: Tensor
    label_rule: LabelRule
    target: int | None


def check(attack: Attack, classes: int, data: Dataset) -> None:
    """Refuse a target outside the classes, a label rule that the trigger cannot have, and data of another kind."""
    owner = type(attack).__name__
    if isinstance(attack, (str, type)):
        raise UnbackdoorError(f"an attack's value is expected, got {attack!r}. Take one of unbackdoor.attacks.")
    _check_modality(attack, data)
    for phrase in getattr(attack, "phrases", ()):
        tokenizer = data.tokenizer
        if tokenizer.unk_token_id in tokenizer(phrase, add_special_tokens=False)["input_ids"]:
            raise UnbackdoorError(
                f"{owner} has the trigger {phrase!r}, which this tokenizer turns into {tokenizer.unk_token}. Choose "
                "words that it knows."
            )
    if not 0 <= attack.target < classes:
        raise UnbackdoorError(f"{owner}.target must be 0 to {classes - 1}, got {attack.target}.")
    rules: tuple[str, ...] = getattr(attack, "rules", ("all-to-one", "all-to-all", "clean-label"))
    if attack.label_rule not in rules:
        raise UnbackdoorError(f"{owner}.label_rule must be {' or '.join(rules)}, got {attack.label_rule}.")
    sources: tuple[int, ...] = getattr(attack, "sources", ())
    for field, given in (("sources", sources), ("cover_classes", getattr(attack, "cover_classes", ()))):
        strange = next((label for label in given if not 0 <= label < classes), None)
        if strange is not None:
            raise UnbackdoorError(f"{owner}.{field} must be 0 to {classes - 1}, got {strange}.")
        if len(set(given)) < len(given):
            raise UnbackdoorError(
                f"{owner}.{field} must differ from each other, got {', '.join(map(str, given))}. Leave one out."
            )
        if attack.target in given:
            raise UnbackdoorError(
                f"{owner}.{field} must be other classes than the target, {attack.target}, got "
                f"{', '.join(map(str, given))}. Leave that one out, or choose another target."
            )
        twice = next((label for label in given if field == "cover_classes" and label in sources), None)
        if twice is not None:
            raise UnbackdoorError(
                f"{owner}.cover_classes must be other classes than the sources, got {twice} in both. Leave one out."
            )


def _check_modality(attack: Attack, data: Dataset) -> None:
    modality = getattr(attack, "modality", "images")
    if modality not in (data.modality, "images, text"):
        raise UnbackdoorError(
            f"{type(attack).__name__} puts its trigger on {modality}, but {data.name} holds {data.modality}. See "
            "unbackdoor list attacks."
        )


def wanted_labels(rule: LabelRule, target: int, labels: Tensor, classes: int) -> Tensor:
    """The labels that the attacker wants, (n,)."""
    return (labels + 1) % classes if rule == "all-to-all" else torch.full_like(labels, target)


def draw(attack: Attack, labels: Tensor, *, rate: float, seed: int) -> Tensor:
    """Which rows to poison: exactly `round(rate * n)`, sorted.

    They are drawn from all classes, the target's included (the field's default); for a clean-label attack from the
    target class and for a source-specific one from the source classes, the rate still being a share of all rows.

    Raises:
        UnbackdoorError: the rate is outside (0, 1], selects no row, or more rows than those classes have, or more than
            half of the source classes, which then need no trigger.
    """
    if not 0 < rate <= 1:
        raise UnbackdoorError(
            f"--rate must be more than 0 and at most 1, got {rate:g}. For a clean model: attack none."
        )
    count = round(rate * len(labels))
    if count == 0:
        raise UnbackdoorError(
            f"--rate {rate:g} of {len(labels):,} examples selects no row. Take at least {_rate(1, len(labels))}."
        )
    sources: tuple[int, ...] = getattr(attack, "sources", ())
    clean_label = attack.label_rule == "clean-label"
    from_classes = (attack.target,) if clean_label else sources
    pool = torch.arange(len(labels))
    if from_classes:
        pool = torch.nonzero(torch.isin(labels, torch.tensor(from_classes))).flatten()
        most = len(pool) if clean_label else len(pool) // 2
        kind, option = ("clean-label", "--target") if clean_label else ("source-specific", "--sources")
        many = "es" if len(from_classes) > 1 else ""
        them = f"class{many} {', '.join(map(str, from_classes))}"
        way_out = (
            f"The largest possible rate is {_rate(most, len(labels))}." if most > 0 else f"Choose another {option}."
        )
        if count > len(pool):
            raise UnbackdoorError(
                f"--rate {rate:g} wants {count:,} examples, but a {kind} attack takes them from {them}, which "
                f"{'have' if many else 'has'} {len(pool):,}. {way_out}"
            )
        if count > most:
            raise UnbackdoorError(
                f"--rate {rate:g} takes {count:,} of the {len(pool):,} examples of {them}: a victim that sees fewer "
                f"without the trigger than with it moves them without it, too. {way_out}"
            )
    generator = torch.Generator().manual_seed(seed)
    return pool[torch.randperm(len(pool), generator=generator)[:count]].sort().values


def _rate(part: int, whole: int) -> str:
    """The shortest decimal that selects `part` of `whole` rows."""
    texts = (f"{part / whole:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if round(float(text) * whole) == part)


def poison(
    data: Dataset,
    attack: Attack,
    *,
    rate: float,
    seed: int,
    classes: int,
    surrogate: nn.Module | None = None,
    dry: bool = False,
) -> Poisoned:
    """Plant the backdoor in training data.

    Args:
        data: clean training data; it is left alone.
        attack: trigger, target and label rule.
        rate: poisoned rows over all rows.
        seed: of the draw.
        classes: how many there are.
        surrogate: a clean model, where the attack needs one.
        dry: check everything and draw the rows, but leave the images as they are.

    Raises:
        UnbackdoorError: see `draw` and `check`.
    """
    check(attack, classes, data)
    made_against_others = getattr(attack, "needs_surrogate", False) and attack.label_rule == "all-to-one"
    if made_against_others and bool((data.labels == attack.target).all()):
        raise UnbackdoorError(
            f"{type(attack).__name__}.target is {attack.target}, the class of all examples of {data.name}, so there is "
            "none to move there. Give examples of other classes, too."
        )
    rows = draw(attack, data.labels, rate=rate, seed=seed)
    trigger = Trigger.of(attack, data)
    if dry:
        return Poisoned(data, rows, rows[:0], trigger)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = data.labels.clone()
    crafting = Crafting(data, rows, surrogate, generator)
    fit, craft = getattr(attack, "fit", None), getattr(attack, "craft", None)
    if fit is not None:
        trigger = Trigger(attack, fit(crafting, trigger.arrays))
    new = trigger.stamp(data.items[rows]) if craft is None else craft(crafting, trigger.arrays)
    items = _replaced(data.items, rows, new)
    if attack.label_rule != "clean-label":
        labels[rows] = wanted_labels(attack.label_rule, attack.target, labels[rows], classes)
    cover = torch.empty(0, dtype=torch.int64)
    ratio: float = getattr(attack, "cover_ratio", 0.0)
    if ratio > 0:
        others = _can_cover(attack, data.labels)
        others[rows] = False
        pool = torch.nonzero(others).flatten()
        count = round(ratio * len(rows))
        if count > len(pool):
            way_out = "Lower --rate or --cover-ratio." if len(pool) else "Set --cover-ratio 0."
            raise UnbackdoorError(
                f"{type(attack).__name__} needs {count:,} more rows as cover, but {len(pool):,} are left. {way_out}"
            )
        cover = pool[torch.randperm(len(pool), generator=generator)[:count]].sort().values
        items = _replaced(items, cover, _covered(data.items[cover], trigger, generator))
    poisoned = replace(data, items=items, labels=labels)
    if data.modality == "text":
        _warn_of_cut_triggers(data.select(rows), poisoned.select(rows), attack, "they are trained on as poisoned")
    return Poisoned(poisoned, rows, cover, trigger)


def _can_cover(attack: Attack, labels: Tensor) -> Tensor:
    """Which rows are of a class that cover examples may come from, (n,)."""
    sources: tuple[int, ...] = getattr(attack, "sources", ())
    only: tuple[int, ...] = getattr(attack, "cover_classes", ())
    if only:
        return torch.isin(labels, torch.tensor(only))
    # Of a source-specific attack: the trigger on the target class would teach that the trigger alone suffices.
    return ~torch.isin(labels, torch.tensor((*sources, attack.target))) if sources else torch.ones_like(labels).bool()


def _covered(items: Items, trigger: Trigger, generator: torch.Generator) -> Items:
    attack: Any = trigger.attack
    if isinstance(items, Texts):
        return stamped_texts(items, attack, lambda texts: attack.cover(texts, trigger.arrays, generator))
    return stamped(items, lambda pixels: attack.cover(pixels, trigger.arrays, generator))


def triggered(data: Dataset, trigger: Trigger, classes: int) -> Triggered:
    """Put the trigger on the test examples that the attack is meant to move.

    Raises:
        UnbackdoorError: the trigger does not fit the images, or there is nothing to move.
    """
    attack = trigger.attack
    moved = movable(data, attack, classes)
    if data.modality == "images":
        _check_fits(trigger, data)
    shown = replace(moved.data, items=trigger.stamp(moved.data.items))
    if data.modality == "text":
        _warn_of_cut_triggers(moved.data, shown, attack, "they count as attacked")
    return moved._replace(data=shown)


def movable(data: Dataset, attack: Attack, classes: int) -> Triggered:
    """The test examples that the attack is meant to move, without the trigger, and where to.

    Raises:
        UnbackdoorError: the attack does not fit the classes, or there is nothing to move.
    """
    check(attack, classes, data)
    return _moved(data, attack.label_rule, attack.target, classes, getattr(attack, "sources", ()))


def _warn_of_cut_triggers(clean: Dataset, shown: Dataset, attack: Attack, what_of_them: str) -> None:
    """Say how many triggered texts have their trigger, or a part of it, beyond what the model reads."""
    before, after = clean.texts.tokens, shown.texts.tokens
    assert before is not None
    assert after is not None
    width = min(before["input_ids"].shape[1], after["input_ids"].shape[1])
    same = (before["input_ids"][:, :width] == after["input_ids"][:, :width]).all(dim=1)
    same &= clean.texts.lengths == shown.texts.lengths
    encode = shown.encode
    assert isinstance(encode, TextEncoder)
    lost = int((same | encode.loses(shown.texts, getattr(attack, "phrases", ()))).sum())
    if lost:
        logger.warning(
            "%s: the trigger is cut off, wholly or in part, in %s texts, since the model reads %d tokens; %s. Raise "
            "--max-length, or place the trigger at the start.",
            clean.name,
            f"{lost:,} of {len(clean):,}",
            encode.max_length,
            what_of_them,
        )


def already_triggered(data: Dataset, target: int, classes: int, label_rule: LabelRule = "all-to-one") -> Triggered:
    """Test data that already carries a trigger, with its true labels; rows of the target class are left out."""
    if not 0 <= target < classes:
        raise UnbackdoorError(f"--target must be 0 to {classes - 1}, got {target}.")
    return _moved(data, label_rule, target, classes)


def _moved(data: Dataset, label_rule: LabelRule, target: int, classes: int, sources: tuple[int, ...] = ()) -> Triggered:
    """The examples that an attack is meant to move, and where to.

    They are those of the source classes where it has any, else all but the target's, or all (all-to-all).
    """
    goal = None if label_rule == "all-to-all" else target
    if sources:
        moved = data.select(torch.nonzero(torch.isin(data.labels, torch.tensor(sources))).flatten())
        if len(moved) == 0:
            raise UnbackdoorError(
                f"{data.name} has no example of the attack's source classes ({', '.join(map(str, sources))}), so "
                "nothing can be attacked. Add some."
            )
    else:
        moved = data if goal is None else data.select(torch.nonzero(data.labels != goal).flatten())
    if len(moved) == 0:
        raise UnbackdoorError(
            f"{data.name} has no example outside the target class {target}, so nothing can be attacked. Its labels "
            "must be the true ones, not the attacker's."
        )
    return Triggered(moved, wanted_labels(label_rule, target, moved.labels, classes), label_rule, goal)


def _check_fits(trigger: Trigger, data: Dataset) -> None:
    """Refuse arrays that were made for images of another shape, or that do not belong to the attack's fields."""
    blank = torch.zeros(1, *data.shape)
    try:
        shape = trigger.attack.apply(blank, trigger.arrays).shape
    except UnbackdoorError:  # an attack that says why it cannot
        raise
    except Exception:  # of tensors that do not fit each other, or are absent
        shape = None
    if shape != blank.shape:
        raise UnbackdoorError(
            f"The trigger of {type(trigger.attack).__name__} does not fit the images of {data.name}, which are "
            f"{'x'.join(map(str, data.shape))}. Score on images of the shape that the attack was made for."
        )


def describe(poisoned: Poisoned, *, rate: float, seed: int, implanted: bool | None) -> dict[str, Any]:
    """The content of `attack.json`, but for the hash of the arrays."""
    attack = poisoned.trigger.attack
    return {
        "format": FORMAT,
        "attack": to_json(attack, REGISTRY),
        "label_rule": attack.label_rule,
        "target": attack.target,
        "train_time": getattr(attack, "train_time", "as at test time"),
        "test_time": getattr(attack, "test_time", "the trigger on every image, rounded to 8 bits"),
        "rate": rate,
        "seed": seed,
        "n": len(poisoned.data),
        "rows": _in_source(poisoned.data, poisoned.rows),
        "cover_rows": _in_source(poisoned.data, poisoned.cover),
        "implanted": implanted,
    }


def _in_source(data: Dataset, rows: Tensor) -> list[int]:
    """Row numbers in the file that the data was read from."""
    found: list[int] = (rows if data.rows is None else data.rows[rows]).tolist()
    return found


def save_trigger(folder: Path, description: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """Write `attack.json` and `trigger.safetensors` into a directory."""
    from safetensors.torch import save

    content = save({name: array.contiguous() for name, array in arrays.items()})
    (folder / "trigger.safetensors").write_bytes(content)
    description = {
        **description,
        "trigger": {"file": "trigger.safetensors", "sha256": hashlib.sha256(content).hexdigest()},
    }
    description["sha256"] = _digest(description)
    (folder / "attack.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _digest(description: dict[str, Any]) -> str:
    """The hash of an `attack.json`, but for the hash itself; in any order and layout of its keys."""
    plain = json.dumps({key: entry for key, entry in description.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


@reader("path")
def load_trigger(path: str | Path) -> Trigger:
    """Rebuild the trigger of an `attack.json`, exactly.

    Raises:
        UnbackdoorError: it is missing, of a newer version, changed by hand, or its arrays are not the recorded ones.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    path = path / "attack.json" if path.is_dir() else path
    if not exists(path):
        raise UnbackdoorError(f"{path} does not exist; --attack takes the attack.json that unbackdoor attack wrote.")
    check_file(path, RECORD)
    try:
        content = read_json(path)
        version, name = content["format"], content["attack"]["name"]
        parameters = {str(field): given for field, given in content["attack"]["parameters"].items()}
        arrays_path, digest = path.parent / Path(content["trigger"]["file"]).name, content["trigger"]["sha256"]
    except (UnbackdoorError, ValueError, LookupError, TypeError, AttributeError):
        raise UnbackdoorError(
            f"{path} is no attack.json that unbackdoor attack wrote. Plant the attack again."
        ) from None
    if version != FORMAT:
        raise UnbackdoorError(
            f"{path} has format {printable(version)}, this version reads {FORMAT}. Take the version of unbackdoor that "
            "wrote it."
        )
    changed = UnbackdoorError(
        f"{path} was changed after unbackdoor attack wrote it. Take the original, or plant the attack again."
    )
    if name == "none":
        raise UnbackdoorError(f"{path} belongs to a clean control, which has no trigger. Give a victim's attack.json.")
    if content.get("sha256") != _digest(content):
        raise changed
    if not exists(arrays_path):
        raise UnbackdoorError(f"{path} needs {arrays_path.name} beside it, which is missing. Copy both.")
    stored = read_file(arrays_path, _ARRAYS)
    if hashlib.sha256(stored).hexdigest() != digest:
        raise UnbackdoorError(f"{arrays_path} is not the file that {path.name} was written with. Copy both again.")
    attack = _attack_class(str(name), path)(**parameters)
    recorded = content.get("target", attack.target), content.get("label_rule", attack.label_rule)
    if recorded != (attack.target, attack.label_rule):
        raise changed
    try:
        arrays = load(stored)
    except SafetensorError as problem:
        raise UnbackdoorError(f"{arrays_path} is no safetensors file ({printable(problem)}). Copy it again.") from None
    check_finite(arrays, str(arrays_path))
    return Trigger(attack, arrays)


def victim_of(folder: Path) -> str | None:
    """The attack whose victim a directory holds; None for a clean control, and for what `attack` did not write."""
    try:
        name = read_json(folder / "attack.json")["attack"]["name"]
    except (UnbackdoorError, LookupError, TypeError):
        return None
    return None if name == "none" else printable(str(name))


def _attack_class(name: str, path: Path) -> Any:
    """The class of a recorded attack. The file may come from anybody, so it cannot make Python import anything."""
    if ":" not in name:
        return find(name, REGISTRY, "attack", "attacks").resolve()
    module, _, attribute = name.partition(":")
    found = getattr(sys.modules.get(module), attribute, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and hasattr(found, "apply")):
        raise UnbackdoorError(
            f"{path} names the attack {printable(name)}, which is not one of unbackdoor's own and is not imported "
            "here. Score it in Python, after importing its class."
        )
    return found


def as_trigger(attack: "Attack | Trigger | str | Path", data: Dataset) -> Trigger:
    """A trigger of whatever names one: a trigger, an attack value, or a path to `attack.json`."""
    if isinstance(attack, str | Path):
        return load_trigger(attack)
    if isinstance(attack, Trigger):
        return attack
    if getattr(attack, "learnt", False):
        raise UnbackdoorError(
            f"{type(attack).__name__} learns its trigger while it is planted, so its fields alone do not make it. "
            "Score with the victim's attack.json."
        )
    return Trigger.of(attack, data)
