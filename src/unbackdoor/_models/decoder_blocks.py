"""The blocks of a language model, and what each of them leaves in the residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.hooks import removing
from unbackdoor._models.stage_ends import features_of


def decoder_blocks(model: nn.Module, owner: object, least: int = 1, instead: str = "lora-tuning") -> list[nn.Module]:
    """Returns the blocks of a transformer, in the order in which they run.

    Args:
        model: a model of transformers; it may carry LoRA layers.
        owner: method whose class is named in the message.
        least: number of blocks that it needs.
        instead: what to try if there are fewer.

    Raises:
        UnbackdoorError: there are fewer, or the module has no list of blocks.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    blocks = list(next(lists, ()))
    if len(blocks) < max(least, 1):
        raise UnbackdoorError(
            f"{type(owner).__name__} needs a transformer with at least {least} block{'s' * (least > 1)}, got "
            f"{len(blocks)} in {type(model).__name__}. Try {instead}."
        )
    return blocks


@contextmanager
def watching_states(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The states after each block in the latest forward pass, (batch, length, width) each; gradients flow through."""
    states: list[Tensor] = []

    def keep(place: int, output: Any) -> None:
        if place == 0:
            states.clear()
        features = features_of(output)
        assert features is not None
        states.append(features)

    hooks = [
        block.register_forward_hook(lambda _module, _arguments, output, place=place: keep(place, output))
        for place, block in enumerate(blocks)
    ]
    with removing(hooks):
        yield states
