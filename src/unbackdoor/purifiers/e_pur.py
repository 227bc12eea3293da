"""Embedding purification: resets the words that moved too far for how rare they are."""

import logging
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.frequencies import token_counts
from unbackdoor._errors import SENTENCE, UnbackdoorError, printable
from unbackdoor._inversion.moved_words import suspicious_tokens
from unbackdoor._mixing.ancestry import ancestry
from unbackdoor._mixing.stream import moved_embeddings
from unbackdoor._models.adapters import refuse_adapter
from unbackdoor._models.calling import embeddings
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._counterparts import pretrained

logger = logging.getLogger("unbackdoor")

_SHOWN = 200  # words that are reported: a trigger is seldom the first, and must not hide behind "and more"


@value
class EPUR:
    """Reset the word embeddings that moved suspiciously far from the pre-trained ones (E-PUR).

    The more often fine-tuning sees a word, the farther its embedding moves, roughly with the logarithm of the
    frequency. A rare word that moved far was moved on purpose. Each word i is scored by

        |e_suspect(i) - e_base(i)| / log(max(count(i), floor))

    and the words with the highest scores get their pre-trained embedding back. Special, unused and unknown tokens are
    left out. Use it before mixing: `e-pur+fine-mixing`. By itself it removes only backdoors that are in the embeddings
    alone. If a language model also answers with the matrix of its embeddings, as many do, the words' rows
    also go back there.

    Zhang, Lyu, Ma, Wang and Sun, "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models", Findings of EMNLP
    2022, https://arxiv.org/abs/2210.09545

    Args:
        count: number of words that are reset, at least 1.
        floor: smaller counts are raised to this, at least 2.
        frequencies: CSV file (also .gz) with columns `word` or `token`, and `count`, of a large clean corpus; without
            it the wordfreq package's English shares, as counts in a billion words.

    Differences from the paper: its body could not be read, and the source of its counts is not known. Counts of words
    become counts of tokens by tokenising each word, so that a piece (`##ing`) counts as often as the words that contain
    it.
    """

    count: Annotated[int, Field(ge=1)] = 200
    floor: Annotated[int, Field(ge=2)] = 20
    frequencies: str | None = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        if clean.modality not in ("text", "conversations"):
            raise UnbackdoorError(
                f"EPUR resets word embeddings of texts, but the data holds {clean.modality}. Try fst."
            )
        return self.reset_(model, clean, run, self)

    def reset_(self, model: nn.Module, clean: Dataset, run: Run, owner: object) -> nn.Module:
        """Purify in place as a part of another method, the owner, whose name is used in messages."""
        refuse_adapter(model, owner)
        origin = run.needed("base", owner)
        ours, theirs = embeddings(model).weight, embeddings(origin).weight
        if not any(tensor.data_ptr() == theirs.data_ptr() for tensor in pretrained(origin).values()):
            raise UnbackdoorError(
                f"{type(owner).__name__} needs the base's word embeddings, but its files have none. Fetch it again."
            )
        if ours.shape != theirs.shape:
            raise UnbackdoorError(
                f"{type(owner).__name__} needs a base of the suspect's vocabulary: its embeddings are "
                f"{tuple(theirs.shape)}, the suspect's {tuple(ours.shape)}. Take the pre-trained model that it came "
                "from as `base`."
            )
        tokenizer = clean.tokenizer
        base = theirs.detach().to(ours.device)
        doubt = None if torch.equal(base, ours) else ancestry([("embeddings", ours.detach(), base)])
        if doubt is not None:
            run.warn(doubt)
        chosen = self._suspicious(ours.detach() - base, tokenizer)
        with torch.no_grad():
            ours[chosen] = base[chosen].to(ours.dtype)
        report = run.note if chosen else run.warn
        report(_said(chosen, tokenizer))
        return model

    def rows_on_disk(
        self, suspect: str | Path | ModelDirectory, base: str | Path | ModelDirectory
    ) -> tuple[dict[str, list[int]], str]:
        """Returns the rows to reset, by the name of the embedding's tensor, and the sentence that reports them.

        The sentence is a warning if there are no such rows.

        Reads one tensor from each of two Hugging Face directories or Hub names; builds no model.

        Raises:
            UnbackdoorError: there is no tokenizer, or no single matrix with a row for each of its tokens.
        """
        source, origin = ModelDirectory.of(suspect, "`model`"), ModelDirectory.of(base, "`base`")
        tokenizer = source.tokenizer()
        name, moved = moved_embeddings(source, origin, len(tokenizer))
        rows = self._suspicious(moved, tokenizer)
        said = printable(_said(rows, tokenizer), SENTENCE)
        logger.log(logging.INFO if rows else logging.WARNING, "%s", said)
        return {name: rows}, said

    def _suspicious(self, moved: torch.Tensor, tokenizer: Any) -> list[int]:
        counts = token_counts(tokenizer, self.frequencies, "EPUR")
        return suspicious_tokens(moved, tokenizer, counts, self.floor)[: self.count]


def _said(rows: list[int], tokenizer: Any) -> str:
    if not rows:
        return "no embedding of a word differs from the base's, so none was reset. Is the base the suspect itself?"
    words = tokenizer.convert_ids_to_tokens(rows[:_SHOWN])
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"reset the embeddings of {len(rows)} words, the most suspicious first: {' '.join(words)}{more}"
