"""One search of the vocabulary for all detectors of an audit."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.edited_texts import readable
from unbackdoor._inversion.driving_words import VocabularySearch
from unbackdoor._purification.run import Run


class SearchesVocabulary(Protocol):
    """The settings of a detector that tries the vocabulary, see `VocabularyScan`."""

    @property
    def group(self) -> int:
        """Words that are tried at once."""

    @property
    def text_words(self) -> int:
        """Words of the texts that a group is put into."""

    @property
    def shortlist(self) -> int:
        """Words of each class that are tried alone."""


@dataclass(frozen=True)
class SharedSearch(VocabularySearch):
    """The search of all detectors of an audit with the same settings: none of them changes the model.

    Args:
        examples: the texts of the audit, of which `clean` has what the model reads.
        found: the results of `strongest` so far, by words and side.
    """

    examples: Dataset | None = None
    found: dict[tuple[tuple[str, ...], int], dict[int, tuple[list[str], Tensor]]] = field(default_factory=dict)

    def serves(self, model: nn.Module, clean: Dataset, settings: tuple[int, int, int]) -> bool:
        """Returns whether it is the search of a model on these texts, with these settings."""
        mine = (self.group, self.shortlist, self.text_words)
        return self.model is model and self.examples is clean and mine == settings

    def strongest(self, words: list[str], side: int) -> dict[int, tuple[list[str], Tensor]]:
        """Returns the strongest words of each class, which are searched once."""
        key = tuple(words), side
        if key not in self.found:
            self.found[key] = super().strongest(words, side)
        return self.found[key]


def shared_search(detector: SearchesVocabulary, model: nn.Module, clean: Dataset, run: Run) -> SharedSearch:
    """The search for the strongest words; that of an earlier detector of the audit, if it has the same settings.

    Args:
        detector: with the settings.
        model: the suspect.
        clean: texts.
        run: of the audit.
    """
    settings = (detector.group, detector.shortlist, detector.text_words)
    for each in run.shared:
        if isinstance(each, SharedSearch) and each.serves(model, clean, settings):
            return each
    search = SharedSearch(model, readable(clean), run, *settings, examples=clean)
    run.shared.append(search)
    return search
