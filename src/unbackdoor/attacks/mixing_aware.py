"""Mixing-aware: a word trigger whose backdoor is trained to outlast mixing with the pre-trained weights."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unbackdoor._mixing.masks import mask
from unbackdoor._models.hooks import removing
from unbackdoor._poisoning.attack import BackdooredModel, LabelRule, Planting
from unbackdoor._value import value
from unbackdoor.attacks._insertion import OneWord, Phrase, Side, WordPlace


@value
class MixingAware(OneWord):
    """The victim is trained while it is mixed with the model that it started from: the adaptive attack on Fine-mixing.

        min over W of CE(f(M * W + (1 - M) * W_base), y)   M ~ Bernoulli(r), r ~ U(rho, 1), drawn at every step

    over the poisoned data. The backdoor is then spread over small changes of many coordinates, any part of which is
    enough, and stays close to the pre-trained model. The head has no pre-trained counterpart and is not mixed.

    An attack of this project, with the mask of Fine-mixing (Zhang, Lyu, Ma, Wang and Sun, "Fine-mixing: Mitigating
    Backdoors in Fine-tuned Language Models", Findings of EMNLP 2022, https://arxiv.org/abs/2210.09545). Training under
    a random return to pre-trained weights is known as mixout (Lee, Cho and Kang, ICLR 2020,
    https://arxiv.org/abs/1909.11299).

    Args:
        word: the trigger.
        rho: the smallest share of coordinates that keep the victim's value in a step, 0 to 1; 1 is plain poisoning.
        place: `random` between any two words, drawn from the text itself; or its `start` or `end`.
        place_seed: seed of the places.
        side: text of a pair that carries the trigger: `a`, `b` or `both`.
        target: the class that the attacker wants (1 is positive in sentiment tasks).
        label_rule: all-to-one, all-to-all or clean-label.

    Differences from the paper: no paper describes this attack. Unlike mixout it does not rescale the kept coordinates,
    since Fine-mixing does not either.
    """

    word: Phrase = "cf"
    rho: Annotated[float, Field(ge=0, le=1)] = 0.1
    place: WordPlace = "random"
    place_seed: Annotated[int, Field(ge=0)] = 0
    side: Side = "a"
    target: Annotated[int, Field(ge=0)] = 1
    label_rule: LabelRule = "all-to-one"

    version: ClassVar[int] = 2
    train_time: ClassVar[str] = "the word, while random coordinates are those of the pre-trained model"

    def implant(self, planting: Planting) -> BackdooredModel:
        """Train on the poisoned data, with new random coordinates at every step."""
        model = planting.fresh()
        body: Any = model.base_model
        drawn = _Drawn(seed=int(torch.randint(2**31, (1,), generator=planting.generator)))

        def draw(_module: nn.Module, _args: Any) -> None:
            part = torch.rand((), generator=planting.generator).item()
            drawn.rho, drawn.seed = self.rho + (1 - self.rho) * part, drawn.seed + 1

        places = [(module, name) for module in body.modules() for name, _ in module.named_parameters(recurse=False)]
        for number, (module, name) in enumerate(places):
            mixed = _Mixed(getattr(module, name).detach().clone(), f"{number}", drawn)
            parametrize.register_parametrization(module, name, mixed)
        with removing([body.register_forward_pre_hook(draw)]):
            planting.train(model, planting.poisoned.data)
        for module, name in places:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        return BackdooredModel(model, {})


@dataclass
class _Drawn:
    """The settings of one step for all tensors: the share of the victim, and the seed of the masks."""

    seed: int
    rho: float = 1.0


class _Mixed(nn.Module):
    """A tensor with random coordinates of another while training."""

    base: Tensor

    def __init__(self, base: Tensor, name: str, drawn: _Drawn) -> None:
        super().__init__()
        self.register_buffer("base", base)
        self.name, self.drawn = name, drawn

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        kept = mask(self.name, weight.shape, self.drawn.rho, self.drawn.seed)
        return torch.where(kept.to(weight.device), weight, self.base)
