"""Planting a backdoor in training data: poisoned rows, their labels, and cover rows."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset, ItemsLike, check_data
from unbackdoor._data.pairs import ImageCaptionPairs
from unbackdoor._errors import UnbackdoorError
from unbackdoor._modes import in_own_modes
from unbackdoor._poisoning.abilities import Covers, Crafts, Fits, cover_classes_of, needs_surrogate, sources_of
from unbackdoor._poisoning.attack import Attack, Crafting, wanted_labels
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.check import check
from unbackdoor._poisoning.planted_answer import TEST_BEHAVIOUR
from unbackdoor._poisoning.prompts import fitting_with_trigger, with_planted_answers
from unbackdoor._poisoning.trigger import Trigger, warn_of_cut_triggers


class Poisoned(NamedTuple):
    """Training data with a backdoor, and the changes that made it.

    Args:
        data: all rows, the poisoned ones changed.
        rows: the poisoned rows, sorted.
        cover: rows with a distorted trigger and their own label, sorted.
        trigger: the trigger on the poisoned rows.
    """

    data: Dataset
    rows: Tensor
    cover: Tensor
    trigger: Trigger


def draw(attack: Attack, labels: Tensor, *, rate: float, seed: int, among: Tensor | None = None) -> Tensor:
    """Draws the rows to poison: exactly `round(rate * n)`, sorted.

    They are drawn from all classes, the target included (as is usual in the literature); for a clean-label attack from
    the target class, and for a source-specific one from the source classes. The rate is always a share of all rows.

    Args:
        attack: trigger, target and label rule.
        labels: labels of all rows.
        rate: the share.
        seed: seed of the draw.
        among: of prompts: the rows that can be poisoned; None for all.

    Raises:
        UnbackdoorError: the rate is outside (0, 1], selects no row, or more rows than those classes have, or more than
            half of the source classes, which then need no trigger; or more rows than can be poisoned.
    """
    if not 0 < rate <= 1:
        raise UnbackdoorError(
            f"`rate` must be more than 0 and at most 1, got {rate:g}. For a clean model: attack none."
        )
    count = round(rate * len(labels))
    if count == 0:
        raise UnbackdoorError(
            f"`rate={rate:g}` of {len(labels):,} examples selects no row. Take at least {_rate(1, len(labels))}."
        )
    sources = sources_of(attack)
    clean_label = attack.label_rule == "clean-label"
    from_classes = (attack.target,) if clean_label else sources
    pool = torch.arange(len(labels)) if among is None else among
    if count > len(pool):
        raise UnbackdoorError(
            f"`rate={rate:g}` wants {count:,} rows, but only {len(pool):,} of {len(labels):,} are short enough for the "
            f"trigger and its answer. The largest possible rate is {_rate(len(pool), len(labels))}."
        )
    if from_classes:
        pool = torch.nonzero(torch.isin(labels, torch.tensor(from_classes))).flatten()
        most = len(pool) if clean_label else len(pool) // 2
        kind, field = ("clean-label", "`target`") if clean_label else ("source-specific", "`sources`")
        many = "es" if len(from_classes) > 1 else ""
        them = f"class{many} {', '.join(map(str, from_classes))}"
        way_out = (
            f"The largest possible rate is {_rate(most, len(labels))}." if most > 0 else f"Choose another {field}."
        )
        if count > len(pool):
            raise UnbackdoorError(
                f"`rate={rate:g}` wants {count:,} examples, but a {kind} attack takes them from {them}, which "
                f"{'have' if many else 'has'} {len(pool):,}. {way_out}"
            )
        if count > most:
            raise UnbackdoorError(
                f"`rate={rate:g}` takes {count:,} of the {len(pool):,} examples of {them}: a victim that sees fewer "
                f"without the trigger than with it also moves them without it. {way_out}"
            )
    generator = torch.Generator().manual_seed(seed)
    return pool[torch.randperm(len(pool), generator=generator)[:count]].sort().values


def _rate(part: int, whole: int) -> str:
    """Returns the shortest decimal that selects `part` of `whole` rows."""
    texts = (f"{part / whole:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if round(float(text) * whole) == part)


@in_own_modes
def poison(
    data: Dataset,
    attack: Attack,
    *,
    rate: float,
    seed: int,
    classes: int,
    behaviour: Behaviour | None = None,
    surrogate: nn.Module | None = None,
    arrays: dict[str, Tensor] | None = None,
    dry: bool = False,
) -> Poisoned:
    """Put a backdoor into training data.

    Args:
        data: clean training data; it is not changed.
        attack: trigger, target and label rule.
        rate: poisoned rows divided by all rows.
        seed: seed of the draw.
        classes: number of classes; 0 for conversations.
        behaviour: of conversations: what the model should answer to the trigger; by default a harmless sentence.
        surrogate: a clean model, if the attack needs one.
        arrays: of the trigger, as an earlier poisoning made them; None makes them.
        dry: check everything and draw the rows, but do not change the images.

    Raises:
        UnbackdoorError: see `draw` and `check`.
    """
    check_data("poison", data=data)
    check(attack, classes, data)
    if needs_surrogate(attack) and attack.label_rule == "all-to-one" and bool((data.labels == attack.target).all()):
        raise UnbackdoorError(
            f"{type(attack).__name__}.target is {attack.target}, the class of all examples of {data.name}, so there is "
            "none to move there. Give examples of other classes as well."
        )
    if data.modality == "conversations":
        behaviour = TEST_BEHAVIOUR if behaviour is None else behaviour
    trigger = Trigger.of(attack, data, behaviour)
    rows = draw(attack, data.labels, rate=rate, seed=seed, among=_poisonable(data, trigger))
    if dry:
        return Poisoned(data, rows, rows[:0], trigger)
    generator = torch.Generator().manual_seed(seed + 1)
    crafting = Crafting(data, rows, surrogate, generator)
    if arrays is not None:
        trigger = replace(trigger, arrays=arrays)
    elif isinstance(attack, Fits):
        trigger = replace(trigger, arrays=attack.fit(crafting, trigger.arrays))
    marked = attack.craft(crafting, trigger.arrays) if isinstance(attack, Crafts) else trigger.stamp(data.items[rows])
    if isinstance(marked, Conversations) and behaviour is not None:
        marked = with_planted_answers(marked, behaviour)
    labels = data.labels.clone()
    if classes and attack.label_rule != "clean-label":
        labels[rows] = wanted_labels(attack.label_rule, attack.target, labels[rows], classes)
        marked = _captioned(marked, data, rows, labels[rows], generator)
    poisoned = data.replaced(rows, marked)
    cover = _cover_rows(attack, data.labels, rows, generator)
    if len(cover):
        covering: Any = attack
        covered = trigger.changed(data.items[cover], lambda part, arrays: covering.cover(part, arrays, generator))
        poisoned = poisoned.replaced(cover, covered)
    poisoned = replace(poisoned, labels=labels)
    if data.modality == "text":
        warn_of_cut_triggers(data.select(rows), poisoned.select(rows), attack, "they are trained on as poisoned")
    return Poisoned(poisoned, rows, cover, trigger)


def _poisonable(data: Dataset, trigger: Trigger) -> Tensor | None:
    """Returns the prompts that are not too long with the trigger and the planted answer, (n,); None for other data."""
    if data.modality != "conversations" or trigger.behaviour is None:
        return None
    marked = trigger.stamp(data.items)
    assert isinstance(marked, Conversations)
    return fitting_with_trigger(data, with_planted_answers(marked, trigger.behaviour), "are not poisoned")


def _cover_rows(attack: Attack, labels: Tensor, poisoned: Tensor, generator: torch.Generator) -> Tensor:
    """Draws the cover rows, sorted; none for most attacks."""
    if not (isinstance(attack, Covers) and attack.cover_ratio > 0):
        return poisoned[:0]
    others = _can_cover(attack, labels)
    others[poisoned] = False
    pool = torch.nonzero(others).flatten()
    count = round(attack.cover_ratio * len(poisoned))
    if count > len(pool):
        way_out = "Lower `rate` or `cover_ratio`." if len(pool) else "Set `cover_ratio=0`."
        raise UnbackdoorError(
            f"{type(attack).__name__} needs {count:,} more rows as cover, but {len(pool):,} are left. {way_out}"
        )
    return pool[torch.randperm(len(pool), generator=generator)[:count]].sort().values


def _can_cover(attack: Attack, labels: Tensor) -> Tensor:
    """Returns which rows are of a class that cover examples may come from, (n,)."""
    sources = sources_of(attack)
    only = cover_classes_of(attack)
    if only:
        return torch.isin(labels, torch.tensor(only))
    # For a source-specific attack: the trigger on the target class would teach that the trigger alone suffices.
    return ~torch.isin(labels, torch.tensor((*sources, attack.target))) if sources else torch.ones_like(labels).bool()


def _captioned(items: ItemsLike, data: Dataset, rows: Tensor, wanted: Tensor, generator: torch.Generator) -> ItemsLike:
    """Returns triggered pairs with captions of the classes that the attacker wants; other items as they are.

    Each caption is that of a clean row of the class, drawn at random.

    Args:
        items: the triggered items, (k,).
        data: the clean training data.
        rows: the poisoned rows, (k,).
        wanted: the class that the attacker wants for each, (k,).
        generator: source of the draws.

    Raises:
        UnbackdoorError: no other row of such a class is left.
    """
    if not isinstance(items, ImageCaptionPairs):
        return items
    clean = torch.ones(len(data), dtype=torch.bool)
    clean[rows] = False
    donors = torch.empty_like(rows)
    for label in wanted.unique().tolist():
        pool = torch.nonzero(clean & (data.labels == label)).flatten()
        if len(pool) == 0:
            raise UnbackdoorError(
                f"{data.name} has no caption of class {data.class_name(label)} for the poisoned pairs. Add pairs of "
                "that class, or choose another `target`."
            )
        places = torch.nonzero(wanted == label).flatten()
        donors[places] = pool[torch.randint(len(pool), (len(places),), generator=generator)]
    return replace(items, captions=data.pairs.captions[donors])
