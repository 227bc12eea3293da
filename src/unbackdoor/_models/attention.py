"""The attention blocks of a transformer, found by running a batch and observing which linear layers run."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import Inputs, evaluating, logits
from unbackdoor._models.hooks import removing
from unbackdoor._models.weight_norms import check_weight_is_own

PARTS = ("query", "key", "value", "attention output", "feed-forward in", "feed-forward out")


class AttentionBlock(NamedTuple):
    """One layer of a transformer.

    Args:
        attention: the module that owns query, key and value.
        parts: linear layers by their kind, see `PARTS`; the first four kinds are always there.
    """

    attention: nn.Module
    parts: dict[str, tuple[nn.Linear, ...]]

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        """Returns all weights of these layers, each with its kind."""
        return [(kind, w) for kind, layers in self.parts.items() for layer in layers for w in layer.parameters()]

    def silence_(self, dead: Tensor) -> None:
        """Set the outputs of attention heads, and the weights of the output layer for them, to zero in place.

        Args:
            dead: the heads, (heads,), bool.

        Raises:
            UnbackdoorError: the weight of such a layer is computed from other tensors.
        """
        (value,), (output,) = self.parts["value"], self.parts["attention output"]
        for layer in (value, output):
            check_weight_is_own(layer, "a layer of its attention")
        columns = dead.to(output.weight.device).repeat_interleave(output.in_features // len(dead))
        with torch.no_grad():
            output.weight[:, columns] = 0
            if value.out_features == len(columns):  # otherwise several heads share their values
                value.weight[columns] = 0
                if value.bias is not None:
                    value.bias[columns] = 0


@torch.no_grad()
def blocks(model: nn.Module, inputs: Inputs) -> list[AttentionBlock]:
    """Finds the attention blocks in running order; none if query, key and value are not three layers of one module.

    Three linear layers of one module that run one after another, with names that begin with q, k and v, make a block;
    the next layer with as many inputs as there are queries is its output. Its feed-forward part is a widening layer and
    the narrowing layer that runs next, as in `units.feed_forward`; a gate next to the first belongs to it.
    """
    ran: dict[nn.Linear, tuple[str, str]] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, _args, name=name: ran.setdefault(layer, name.rpartition(".")[::2]) and None
        )
        for name, layer in layers.items()
    ]
    with removing(hooks), evaluating(model):
        logits(model, inputs)
    order = list(ran)
    starts = [
        place
        for place in range(len(order) - 3)
        if len({ran[layer][0] for layer in order[place : place + 3]}) == 1
        and {ran[layer][1][:1] for layer in order[place : place + 3]} == set("qkv")
    ]
    attention_blocks: list[AttentionBlock] = []
    for start, end in itertools.pairwise([*starts, len(order)]):
        named = {ran[layer][1][:1]: layer for layer in order[start : start + 3]}
        if order[start + 3].in_features != named["q"].out_features:
            continue
        parts: dict[str, tuple[nn.Linear, ...]] = {
            "query": (named["q"],),
            "key": (named["k"],),
            "value": (named["v"],),
            "attention output": (order[start + 3],),
        }
        for wide, back in itertools.pairwise(order[start + 4 : end]):
            if wide.in_features == back.out_features < wide.out_features == back.in_features:
                alike = [layer for layer in order[start + 4 : end] if layer.weight.shape == wide.weight.shape]
                parts |= {"feed-forward in": tuple(alike), "feed-forward out": (back,)}
        attention_blocks.append(AttentionBlock(model.get_submodule(ran[named["q"]][0]), parts))
    return attention_blocks


@contextmanager
def first_rows(model: nn.Module, attention_blocks: list[AttentionBlock], method: object) -> Iterator[list[Tensor]]:
    """Records the attention from the first token of each text to all tokens in each forward pass of the block.

    Meanwhile attention is computed in single steps (`eager` of transformers), since the faster implementations do not
    keep its weights.

    Args:
        model: the model that has these blocks.
        attention_blocks: blocks of the model, at least one.
        method: its name is used in messages.

    Yields:
        one tensor per block after each forward pass, (batch, heads, tokens), float32.

    Raises:
        UnbackdoorError: the model does not show its attention.
    """
    refusal = UnbackdoorError(
        f"{type(method).__name__} needs a model of transformers that shows its attention; {type(model).__name__} does "
        "not. Try fine-pruning."
    )
    owner: Any = next((part for part in model.modules() if hasattr(part, "set_attn_implementation")), None)
    if owner is None:
        raise refusal
    rows: list[Tensor] = [torch.empty(0)] * len(attention_blocks)

    def keep(number: int, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.ndim != 4:
            raise refusal
        rows[number] = weights[:, :, 0].float()  # (batch, heads, tokens)

    before = owner.config._attn_implementation
    hooks = [
        block.attention.register_forward_hook(lambda _module, _args, output, number=number: keep(number, output))
        for number, block in enumerate(attention_blocks)
    ]
    with removing(hooks):
        try:
            owner.set_attn_implementation("eager")
            yield rows
        finally:
            owner.set_attn_implementation(before)


@torch.no_grad()
def variances(
    model: nn.Module, attention_blocks: list[AttentionBlock], clean: Dataset, arithmetic: Arithmetic, method: object
) -> list[Tensor]:
    """Returns the variance of the first token's attention over tokens, averaged over texts: (heads,) for each block."""
    totals: list[Tensor] = []
    with first_rows(model, attention_blocks, method) as rows, evaluating(model):
        for batch in clean.batches(arithmetic.evaluation_batch):
            with arithmetic.autocast():
                logits(model, arithmetic.lay(batch.inputs))
            sums = [spread(row, batch.inputs).sum(dim=0).cpu() for row in rows]
            totals = [first + second for first, second in zip(totals, sums, strict=True)] if totals else sums
    return [total / len(clean) for total in totals]


def spread(row: Tensor, inputs: Tensor | Tokens) -> Tensor:
    """Returns the variance of each (batch, heads, tokens) row over its tokens without padding, (batch, heads)."""
    real = torch.ones_like(row[:, :1])
    if isinstance(inputs, Tokens):
        real = inputs["attention_mask"][:, None].to(row)  # (batch, 1, tokens)
    count = real.sum(dim=2)
    mean = (row * real).sum(dim=2) / count
    return ((row - mean[:, :, None]).square() * real).sum(dim=2) / count
