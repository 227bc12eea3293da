"""Labels: from the spelling in a data set to the numbers of a model's classes."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from unbackdoor._errors import NoLabelsError, UnbackdoorError, printable

logger = logging.getLogger("unbackdoor")

_NUMERAL = re.compile(r"([+-]?\d{1,18})(?:\.0*)?", re.ASCII)
_LIST = re.compile(r"\s*\[[\d\s.,]*\]\s*")  # as tables write the lists of several labels
_UNNAMED = re.compile(r"label_(\d{1,6})", re.ASCII | re.IGNORECASE)  # as transformers calls classes without a name
_TRUTH = {"false": 0, "true": 1}
_AFFIRMING, _DENYING = {"true", "yes", "positive", "pos", "1"}, {"false", "no", "negative", "neg", "0"}


def class_numbers(
    cells: Sequence[Any], names: Sequence[str] | None, classes: Sequence[str] | None, where: str
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Returns the class of each example, however its label is spelt.

    A label is the same in every format: `1`, `1.0`, `"1"` and `" 1 "` are one number, `true`, `"True"` one word. Words
    are matched to the model's classes; case and surrounding blanks do not count, nor whether blanks, hyphens or
    underscores separate the words of a name. Whole numbers are class indices, unless all of them are names of classes.

    Args:
        cells: the label column.
        names: class names for whole numbers in it, from a `ClassLabel` column or the folders of pictures.
        classes: the model's class names, if it has any.
        where: name of the data, for messages.

    Returns:
        Class indices (n,), int64, in the model's order; and the names of the classes, None if they are unknown.

    Raises:
        UnbackdoorError: a label is missing, is not a class, or is not a class of the model.
    """
    texts = _texts(cells, where)
    counted: dict[str, int] = {}  # the numbers that the data itself gives to its names
    if names is not None and all(_NUMERAL.fullmatch(text) for text in set(texts)):
        numbers = [_number(text) for text in texts]
        of_model = classes is not None and list(names) == list(classes)
        check_range(numbers, len(names), where, "the model has" if of_model else "it names")
        if classes is None or of_model:
            return torch.tensor(numbers), tuple(names)
        texts = [names[number].strip() for number in numbers]
        counted = dict(zip(texts, numbers, strict=True))
    if classes is None:
        meaning, known = _meaning(dict.fromkeys(texts), where)
        check_range([meaning[text] for text in texts], None, where, "")
    else:
        meaning, known = matched({text: counted.get(text) for text in texts}, classes, where), tuple(classes)
        check_range([meaning[text] for text in texts], len(classes), where, "the model has")
    return torch.tensor([meaning[text] for text in texts]), known


def matched(labels: Mapping[str, int | None], classes: Sequence[str], where: str) -> dict[str, int]:
    """Returns each label's number in the model's order; the log says so if it is neither its name nor its number.

    Args:
        labels: labels as text, with the number that the data gives to each, or None.
        classes: the model's class names.
        where: name of the data, for messages.

    Raises:
        UnbackdoorError: the model does not know a label, or has two classes of that name.
    """
    exact, by_key = _once(classes), _once([alike(name) for name in classes])
    named = {text: exact.get(text, by_key.get(alike(text))) for text in labels}
    if None in named.values():
        named = _by_synonyms(named, classes)
    if None not in named.values():
        meaning: dict[str, int] = {text: number for text, number in named.items() if number is not None}
        how = "matched to the model's classes by name"
    elif all(_NUMERAL.fullmatch(text) for text in labels):
        meaning, how = {text: _number(text) for text in labels}, "read as the model's class indices"
    elif all(_UNNAMED.fullmatch(text) for text in labels):
        meaning, how = _by_pattern(labels), "read as the model's class indices"
    elif len(classes) == 2 and all(text.casefold() in _TRUTH for text in labels):
        first, second = map(alike, classes)
        if first in _AFFIRMING or second in _DENYING or second.split()[:1] in (["not"], ["non"], ["no"]):
            raise UnbackdoorError(
                f"{where} has the labels True and False, but the model's classes are {', '.join(classes)}, in this "
                "order. Write these names as labels, so that nothing is mistaken."
            )
        meaning, how = {text: _TRUTH[text.casefold()] for text in labels}, "read as the model's class indices"
    else:
        strange = next(text for text, number in named.items() if number is None)
        if strange in classes or alike(strange) in map(alike, classes):
            raise UnbackdoorError(
                f"{where} has its classes in another order than the model, which has two of one name. Give labels as "
                "the model's numbers."
            )
        some = ", ".join([*map(printable, classes[:10]), *["..."] * (len(classes) > 10)])
        raise UnbackdoorError(
            f"{where} has the class {_quoted(strange)}, which the model does not know; its classes are {some}. Rename "
            "the classes, or take other data."
        )
    changes = [
        f"{printable(text)} = {number}"
        + (f" ({printable(classes[number])})" if alike(classes[number]) != alike(text) else "")
        for text, number in meaning.items()
        if 0 <= number < len(classes) and not _is_obvious(text, number, labels[text], classes)
    ]
    if changes:
        logger.info("%s: labels were %s: %s.", where, how, ", ".join([*changes[:5], *["..."] * (len(changes) > 5)]))
    return meaning


def _by_synonyms(named: dict[str, int | None], classes: Sequence[str]) -> dict[str, int | None]:
    """Returns labels with the classes of which they are one of several names, as in "tench, Tinca tinca" of ImageNet.

    Labels stay as they are if two of them then are of one class.
    """
    synonyms = [(alike(part), number) for number, name in enumerate(classes) for part in name.split(",")]
    places, counts = dict(synonyms), Counter(part for part, _ in dict.fromkeys(synonyms))
    found = {
        text: places.get(alike(text))
        if number is None and counts[alike(text)] == 1 and not _NUMERAL.fullmatch(text)
        else number
        for text, number in named.items()
    }
    own = [number for number in found.values() if number is not None]
    return named if len(set(own)) < len(own) else found


def check_range(
    labels: Sequence[int], classes: int | None, where: str, owner: str, rows: Sequence[int] | None = None
) -> None:
    """Refuse labels below 0, or beyond the classes that `owner` has; `rows` has their places in the source."""
    limit = 2**31 if classes is None else classes
    position = next((position for position, label in enumerate(labels) if not 0 <= label < limit), None)
    if position is None:
        return
    row = position if rows is None else rows[position]
    bound = "labels count from 0" if classes is None else f"{owner} {classes} classes (0 to {classes - 1})"
    way_out, kind = "Correct the label, or take other data.", UnbackdoorError
    if min(labels) == 1 and max(labels) == classes:
        way_out = f"They run from 1 to {classes}: subtract 1 from each, or take other data."
    if set(labels) == {-1}:  # as GLUE has it for its test data
        way_out = "All of them are -1, which marks labels that were not published: take a split that has them."
        kind = NoLabelsError
    raise kind(f"{where} has label {labels[position]} in row {row}, but {bound}. {way_out}")


def _texts(cells: Sequence[Any], where: str) -> list[str]:
    """Each label as text, without blanks around it; the same text for a whole number of any type."""
    known: dict[tuple[type, Any], str] = {}
    texts = []
    for row, cell in enumerate(cells):
        blank = isinstance(cell, str) and not cell.strip()
        if cell is None or blank or cell != cell:  # as NaN is
            raise NoLabelsError(f"{where} has no label in row {row}; every row needs one.")
        listed = isinstance(cell, str) and _LIST.fullmatch(cell)
        if listed or not isinstance(cell, bool | int | float | Decimal | str):
            raise _no_class(cell, row, where)
        key = (type(cell), cell)
        if key not in known:
            if isinstance(cell, float | Decimal):
                if not (-(2**31) < cell < 2**31 and cell == int(cell)):
                    raise _no_class(cell, row, where)
                known[key] = str(int(cell))
            else:
                known[key] = str(cell).strip()
        texts.append(known[key])
    return texts


def _meaning(labels: Mapping[str, Any], where: str) -> tuple[dict[str, int], tuple[str, ...] | None]:
    """Returns the number of each label without a model, and the class names if labels are names."""
    if all(_NUMERAL.fullmatch(text) for text in labels):
        return {text: _number(text) for text in labels}, None
    if all(_UNNAMED.fullmatch(text) for text in labels):
        return _by_pattern(labels), None
    if all(text.casefold() in _TRUTH for text in labels):
        return {text: _TRUTH[text.casefold()] for text in labels}, ("False", "True")
    numbers = sorted(filter(_is_number, labels), key=lambda text: _NUMERAL.fullmatch(text) is not None)
    if numbers:
        raise UnbackdoorError(
            f"{where} has the label {_quoted(numbers[0])}; labels must be whole numbers or class names, and of one "
            "kind (a number to predict is not supported)."
        )
    spellings: dict[str, str] = {}
    for text in labels:
        other = spellings.setdefault(alike(text), text)
        if other != text:
            raise UnbackdoorError(
                f"{where} has the labels {_quoted(other)} and {_quoted(text)}, which look like one class. Spell them "
                "the same way, or give labels as numbers."
            )
    names = sorted(labels)
    return {name: number for number, name in enumerate(names)}, tuple(names)


def _once(names: Sequence[str]) -> dict[str, int]:
    """Returns the positions of the names that occur once."""
    counts = Counter(names)
    return {name: position for position, name in enumerate(names) if counts[name] == 1}


def alike(name: str) -> str:
    """Returns a text that is equal for two spellings of one name.

    >>> [alike(name) for name in (" Sci-Fi", "sci_fi", "SCI  FI", "01", "1.0", "-1", "_")]
    ['sci fi', 'sci fi', 'sci fi', '1', '1', '-1', '_']
    """
    text = unicodedata.normalize("NFKC", name).strip().casefold()
    if _NUMERAL.fullmatch(text):
        return str(_number(text))
    return " ".join(word for word in re.split(r"[\s_-]+", text) if word) or text


def _number(text: str) -> int:
    numeral = _NUMERAL.fullmatch(text)
    assert numeral is not None, text
    return int(numeral.group(1))


def _by_pattern(labels: Mapping[str, Any]) -> dict[str, int]:
    return {text: int(match.group(1)) for text in labels if (match := _UNNAMED.fullmatch(text))}


def _is_obvious(text: str, number: int, counted: int | None, classes: Sequence[str]) -> bool:
    """Whether a label means the expected class: that of its name, or of its index."""
    if counted is not None and counted != number:
        return False
    return _number(text) == number if _NUMERAL.fullmatch(text) else classes[number] == text


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))  # 1,5 as spreadsheets in many countries write it
    except ValueError:
        return False
    return True


def _no_class(cell: Any, row: int, where: str) -> UnbackdoorError:
    return UnbackdoorError(
        f"{where} has the label {_quoted(cell)} in row {row}; labels must be whole numbers or class names "
        "(several labels or a number to predict are not supported)."
    )


def _quoted(cell: Any) -> str:
    return printable(repr(cell) if isinstance(cell, str) else cell)
