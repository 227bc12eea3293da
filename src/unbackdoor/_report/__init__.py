"""The page about a purification: numbers first, one self-contained HTML file after."""

from typing import Any, NamedTuple

from torch import nn

from unbackdoor._attack import Triggered
from unbackdoor._data import Dataset
from unbackdoor._evaluate import Score


class Contender(NamedTuple):
    """One model on the page.

    Args:
        name: `suspect` for the first, the method's name for the others.
        model: to show what it takes pictures for.
        score: measured.
        seconds: of purification; None for the suspect.
    """

    name: str
    model: nn.Module
    score: Score
    seconds: float | None


def build(
    *, title: str, contenders: list[Contender], test: Dataset, attacked: Triggered | None, record: dict[str, Any]
) -> Any:
    """The numbers of the page."""
    return title


def render(page: Any) -> str:
    """The page."""
    return ""
