"""Virtual tokens: embeddings of a guard's own in front of a text, in a model that stays as it is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import embeddings
from unbackdoor._models.hooks import removing
from unbackdoor._purification.run import Run
from unbackdoor.guards._words import texts_like

WORD = "a"  # holds the places; its own embedding is not used


@dataclass(frozen=True)
class VirtualTokens:
    """The places of virtual tokens in a text that `led` returned.

    Args:
        lead: number of special tokens before them.
        count: number of virtual tokens.
    """

    lead: int
    count: int

    @classmethod
    def of(cls, data: Dataset, words: int) -> "VirtualTokens":
        """The places for a tokenizer, if some words are put in front of each text."""
        text = " ".join([WORD] * words)
        pieces = data.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = data.tokenizer(text)["input_ids"]
        ends = range(len(whole) - len(pieces) + 1)
        return cls(next(lead for lead in ends if whole[lead : lead + len(pieces)] == pieces), len(pieces))

    def scores(self, model: nn.Module, inputs: Tokens, rows: Tensor, run: Run) -> Tensor:
        """Class scores with other embeddings at these places, (batch, classes); a gradient flows into them.

        Args:
            model: a text model.
            inputs: a batch of texts that `led` returned.
            rows: the embeddings, (batch, count, width).
            run: arithmetic.

        Raises:
            UnbackdoorError: the model does not look its embeddings up where it says that it does.
        """
        kept = inputs["attention_mask"].bool()
        number = kept.long().cumsum(dim=1) - 1 - self.lead  # of each token, from the first virtual one
        virtual = kept & (number >= 0) & (number < self.count)
        index = number.clamp(0, self.count - 1)[..., None].expand(-1, -1, rows.shape[2])
        changed: list[Tensor] = []

        def change(_layer: nn.Module, _arguments: object, output: Tensor) -> Tensor:
            if changed or output.shape[:2] != virtual.shape:
                return output
            changed.append(torch.where(virtual[..., None], rows.to(output).gather(1, index), output))
            return changed[0]

        table = embeddings(model).weight
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Embedding) and layer.weight is table]
        with removing([layer.register_forward_hook(change) for layer in layers]):  # an encoder may have one of its own
            scores = run.scores(model, inputs)
        if not changed:
            raise UnbackdoorError(
                f"{type(model).__name__} does not look up its tokens in get_input_embeddings, which guards with "
                "virtual tokens need. Try strip."
            )
        return scores


def led(inputs: Dataset, words: int) -> Dataset:
    """The same texts or pairs with places for virtual tokens in front, without labels."""
    before = " ".join([WORD] * words)
    return texts_like(inputs, [(f"{before} {first}", *others) for first, *others in inputs.texts.strings])


def starting_rows(model: nn.Module, data: Dataset, count: int) -> Tensor:
    """The embedding of the word that holds the places, `count` times, (count, width)."""
    token = data.tokenizer(WORD, add_special_tokens=False)["input_ids"][:1]
    layer = embeddings(model)
    with torch.no_grad():
        row: Tensor = layer(torch.tensor([token], device=layer.weight.device))[0]
    return row.float().repeat(count, 1)
