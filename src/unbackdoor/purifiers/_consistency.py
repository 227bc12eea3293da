"""How much the blocks of a language model turn its states, and the embeddings that make them turn most."""

import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor._data.texts import Tokens
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import embeddings
from unbackdoor._models.decoder_blocks import watching_states
from unbackdoor._models.hooks import removing


def turning(states: list[Tensor], mask: Tensor) -> Tensor:
    """Returns the mean of 1 - cos between neighbouring states, over pairs of neighbours and tokens, ().

    Args:
        states: states after successive blocks, (batch, length, width) each.
        mask: 1 for tokens, 0 for padding, (batch, length).
    """
    weights = mask / mask.sum()
    pairs = itertools.pairwise(states)
    each = [(weights * (1 - F.cosine_similarity(now, after, dim=-1, eps=1e-8))).sum() for now, after in pairs]
    return torch.stack(each).mean()


class Stack:
    """The blocks of a model between its embeddings and its head, run from embeddings that may be changed.

    The embedding layer is watched, so that all that a model does with its output (a scale, positions) is done here too.

    Args:
        model: a causal language model of transformers.
        blocks: all its blocks.
        arithmetic: arithmetic of the run.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], arithmetic: Arithmetic) -> None:
        asked: Any = model
        self.decoder: nn.Module = asked.get_decoder()
        self.words = embeddings(model)
        self.blocks = blocks[:-1]  # the state after the last block is not a part of it, as in the paper's code
        self.arithmetic = arithmetic

    def turning(self, inputs: Tokens, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns how much the blocks turn the states, (), and the embeddings, (batch, length, width), a leaf.

        Args:
            inputs: a batch.
            change: added to the embeddings; None for the embeddings as they are.
        """
        leaves: list[Tensor] = []

        def replaced(_layer: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
            leaf = output.detach() if change is None else output.detach() + change
            leaves.append(leaf.requires_grad_(change is None))
            return leaves[0]

        laid: Any = self.arithmetic.lay(inputs)
        hook = self.words.register_forward_hook(replaced)
        with removing([hook]), watching_states(self.blocks) as states, self.arithmetic.autocast():
            self.decoder(**laid, use_cache=False)
        exact = [state if state.dtype == torch.float64 else state.float() for state in states]
        return turning(exact, inputs["attention_mask"].to(exact[0])), leaves[0]

    def perturbation(
        self, inputs: Tokens, epsilon: float, unit: Literal["absolute", "relative"]
    ) -> tuple[Tensor, float]:
        """Returns the change of the embeddings that turns the states most, to first order, and the share of 0 signs.

        Args:
            inputs: a batch.
            epsilon: size of the change of each number, at least 0.
            unit: of epsilon: 1, or the root mean square of the batch's embeddings, without padding.
        """
        turned, embedded = self.turning(inputs)
        (slope,) = torch.autograd.grad(turned, embedded)
        real = inputs["attention_mask"].bool()
        size = epsilon * (1.0 if unit == "absolute" else float(embedded.detach()[real].square().mean().sqrt()))
        return size * slope.sign() * real[..., None], float((slope[real] == 0).double().mean())
