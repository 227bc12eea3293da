"""A language model that answers without some directions of its states."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._models.hooks import removing
from unbackdoor._models.stage_ends import changing
from unbackdoor.guards._weight_changes import changed_blocks


def cosines(states: Tensor, directions: Tensor) -> Tensor:
    """The cosines of states with directions of unit length, (..., directions), in float32.

    Args:
        states: (..., width).
        directions: (directions, width).
    """
    wide = states.float()
    length = wide.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    cosine: Tensor = wide @ directions.to(wide).T / length
    return cosine


def without(states: Tensor, directions: Tensor, chosen: Tensor) -> Tensor:
    """States without the part that lies in the span of the chosen directions.

    Args:
        states: (..., width).
        directions: (directions, width), of unit length; they need not be at right angles.
        chosen: which directions of each state, (..., directions), bool.
    """
    rows = chosen.any(dim=-1)
    wide, weights = states[rows].float(), chosen[rows].float()
    basis = directions.to(wide)
    products = weights[:, :, None] * (basis @ basis.T) * weights[:, None, :]
    # In float32, LAPACK fails on some processors at so many eigenvalues of 0; on some devices there is no float64.
    inverse = torch.linalg.pinv(products.cpu().double(), hermitian=True, rtol=1e-5).to(wide)
    parts = inverse @ (weights * (wide @ basis.T))[:, :, None]
    changed = states.clone()
    changed[rows] = (wide - (weights * parts[:, :, 0]) @ basis).to(states)
    return changed


@contextmanager
def steered(
    model: nn.Module, blocks: list[nn.Module], learnt: Mapping[str, Tensor], threshold: float
) -> Iterator[None]:
    """While the block runs, a direction whose cosine left its range is taken out of the states until the answer ends.

    Args:
        model: a language model of transformers.
        blocks: of the model, in order.
        learnt: directions and ranges, as `WeightWatch` fits them.
        threshold: how far a cosine may lie outside.
    """
    state = _Generation(learnt, threshold)
    body = next(module for module in model.modules() if any(_holds(child, blocks) for child in module.children()))
    with ExitStack() as stack:
        stack.enter_context(removing([body.register_forward_pre_hook(state.begin, with_kwargs=True)]))
        for number in changed_blocks(learnt):
            stack.enter_context(changing(blocks[number], partial(state.changed, number)))
        yield


def _holds(module: nn.Module, blocks: list[nn.Module]) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == len(blocks) and module[0] is blocks[0]


class _Generation:
    """The directions that left their range since the answers to a batch of prompts began.

    Args:
        learnt: directions and ranges.
        threshold: how far a cosine may lie outside.
    """

    def __init__(self, learnt: Mapping[str, Tensor], threshold: float) -> None:
        self.learnt, self.threshold = learnt, threshold
        self.role = 0
        self.counted = torch.zeros(0, 0, dtype=torch.bool)
        self.tripped: dict[int, Tensor] = {}

    def begin(self, _body: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Take down which tokens a forward pass has: those of prompts, or the next one of each answer."""
        tokens = arguments[0] if arguments else named.get("input_ids")
        tokens = named["inputs_embeds"] if tokens is None else tokens
        past, mask = named.get("past_key_values"), named.get("attention_mask")
        batch, length = tokens.shape[:2]
        if past is not None and past.get_seq_length() > 0:
            self.role, self.counted = 1, torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = torch.ones(batch, length, dtype=torch.int64, device=tokens.device)
        inside = mask.bool()
        self.role, self.tripped = 0, {}
        self.counted = inside & (inside.long().cumsum(dim=1) > 1)  # the first token measures nothing

    def changed(self, number: int, states: Tensor) -> Tensor:
        """The states after a block without the directions that left their range, at this token or before it."""
        directions = self.learnt[f"directions.{number}"].to(states.device)
        low, high = (self.learnt[f"{end}.{number}"][self.role].to(states.device) for end in ("low", "high"))
        angles = cosines(states, directions)
        outside = (angles - high > self.threshold) | (low - angles > self.threshold)
        outside = (outside & self.counted[..., None]).int().cummax(dim=1).values.bool()
        if number in self.tripped:
            outside |= self.tripped[number][:, None]
        self.tripped[number] = outside[:, -1]
        return without(states, directions, outside) if bool(outside.any()) else states
