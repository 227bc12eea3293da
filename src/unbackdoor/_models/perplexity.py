"""The perplexity of texts under a causal language model, kept by text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import embeddings, evaluating
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.language_models import context_of
from unbackdoor._models.tokenizer import check_ids, check_rows

_KEPT = 1_000_000  # texts whose perplexity is kept
_TOKENS = 2048  # in a forward pass: its output holds, for each, a number for every token of the vocabulary


@dataclass(eq=False)
class Perplexity:
    """A causal language model that rates texts.

    Args:
        model: returns an output whose `logits` are (batch, length, tokens).
        tokenizer: its tokenizer, from transformers.
        max_length: number of tokens that are read of a text; the rest is cut off.
        kept: perplexities of texts that were rated before.
        forwards: the number of texts that went through the model.
    """

    model: nn.Module
    tokenizer: Any
    max_length: int = 512
    kept: dict[str, float] = field(default_factory=dict, repr=False)
    forwards: int = 0

    @classmethod
    def load(cls, source: str | Path) -> "Perplexity":
        """Load a causal language model of a Hugging Face directory or of the Hub.

        Raises:
            UnbackdoorError: a file is missing or damaged, or it is not such a model.
        """
        directory = ModelDirectory.of(source, "`reference`")
        if directory.modality != "conversations":
            raise UnbackdoorError(f"`reference` must be a causal language model, got {source}.")
        model = directory.language_model()
        rows = embeddings(model).num_embeddings
        tokenizer = directory.tokenizer(rows)
        check_rows(directory.path, len(tokenizer), rows)
        check_ids(directory.path, tokenizer, rows)
        return cls(model, tokenizer, min(cls.max_length, context_of(model)))

    def of(self, texts: Sequence[str], arithmetic: Arithmetic) -> Tensor:
        """The perplexity of each text, exp of the mean over its tokens of -log p, (n,), float64.

        The first token is rated after the token that begins a text, or that ends one; if the tokenizer has neither, it
        is not rated. A text without a token to rate has a perplexity of 1.

        Args:
            texts: n texts.
            arithmetic: device and precision.
        """
        if len(self.kept) > _KEPT:
            self.kept.clear()
        fresh = list(dict.fromkeys(text for text in texts if text not in self.kept))
        with torch.no_grad(), evaluating(self.model), arithmetic.placed(self.model) as placed:
            for batch in self._batches(fresh):
                rated = self._rated(placed, [ids for _, ids in batch], arithmetic)
                self.kept.update(zip((text for text, _ in batch), rated, strict=True))
        return torch.tensor([self.kept[text] for text in texts], dtype=torch.float64)

    def reads(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is read to its end."""
        if not texts:
            return []
        most = self._room + 1  # so that the tokenizer does not warn of long texts
        tokens = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=most)["input_ids"]
        return [len(ids) < most for ids in tokens]

    @property
    def _first(self) -> list[int]:
        """The token after which the first one of a text is rated, if there is one."""
        return [token for token in _around(self.tokenizer) if token is not None][:1]

    @property
    def _room(self) -> int:
        """The number of tokens that are read of a text."""
        return self.max_length - len(self._first)

    def _batches(self, texts: list[str]) -> Iterator[list[tuple[str, list[int]]]]:
        """Yields texts with their tokens, of about the same length."""
        begin, length = self._first, self._room
        tokens = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=length) if texts else {}
        pairs = [(text, begin + ids) for text, ids in zip(texts, tokens.get("input_ids", ()), strict=True)]
        pairs.sort(key=lambda pair: len(pair[1]))
        batch: list[tuple[str, list[int]]] = []
        for pair in pairs:
            if batch and (len(batch) + 1) * len(pair[1]) > _TOKENS:
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch

    def _rated(self, model: nn.Module, tokens: list[list[int]], arithmetic: Arithmetic) -> list[float]:
        """The perplexities of a batch."""
        longest = max(map(len, tokens))
        if longest < 2:
            return [1.0] * len(tokens)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in tokens], device=arithmetic.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in tokens], device=arithmetic.device)
        self.forwards += len(tokens)
        with arithmetic.autocast():
            scores = model(input_ids=padded, attention_mask=mask).logits
        losses = F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), padded[:, 1:].flatten(), reduction="none")
        rated = mask[:, 1:].double()  # padding is not rated
        sums = (losses.view(len(tokens), -1).double() * rated).sum(dim=1)
        means = sums / rated.sum(dim=1).clamp(min=1)
        return [math.exp(min(mean, 700.0)) for mean in means.tolist()]  # exp(710) is infinite


def _around(tokenizer: Any) -> tuple[int | None, int | None]:
    """The tokens that begin and end a text."""
    return tokenizer.bos_token_id, tokenizer.eos_token_id
