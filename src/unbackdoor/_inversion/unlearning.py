"""Unlearning an inverted trigger: a model that sees it on a share of each batch while it is tuned."""

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._inversion.triggers import InvertedTrigger, encoded
from unbackdoor._models.calling import logits
from unbackdoor._models.perturbation import perturbed_logits
from unbackdoor._purification.run import Run


def triggered_rows(count: int, share: float) -> Tensor:
    """Returns which of `count` examples get the trigger: int(share * count + 1) of them, evenly spread.

    They are spread because batches of texts are sorted by length.

    >>> triggered_rows(10, 0.2).tolist()
    [0, 3, 6]
    """
    triggered = min(int(share * count + 1), count)
    return torch.arange(triggered) * count // triggered


class WithTrigger(nn.Module):
    """A model that puts an inverted trigger on a share of each batch, for `run.tune` and `descend`.

    Args:
        model: the model to tune.
        clean: data whose encoder makes the model's inputs.
        run: the run of the purification.
        trigger: trigger that is put on pixels before encoding; for texts, on the embeddings.
        share: share of each batch, see `triggered_rows`.
    """

    def __init__(self, model: nn.Module, clean: Dataset, run: Run, trigger: InvertedTrigger, share: float) -> None:
        super().__init__()
        self.model, self.clean, self.run = model, clean, run
        self.trigger, self.share = trigger, share

    def forward(self, pixels: Tensor | None = None, **tokens: Tensor) -> Tensor:
        """Returns class scores of pixels from a batch of `in_pixels`, or of tokens."""
        if pixels is None:
            return self._of_text(Tokens(tokens))
        rows = triggered_rows(len(pixels), self.share).to(pixels.device)
        with torch.no_grad():
            pixels = pixels.index_copy(0, rows, self.trigger(pixels[rows]).to(pixels.dtype))
        return logits(self.model, encoded(self.clean, pixels, self.run))

    def _of_text(self, tokens: Tokens) -> Tensor:
        rows = triggered_rows(len(tokens), self.share)
        shift = self.trigger(torch.zeros((), device=tokens["input_ids"].device))  # (1, 1, width)
        mask = shift.new_zeros(len(tokens), 1, 1)
        mask[rows] = 1
        return perturbed_logits(self.model, tokens, mask * shift)
