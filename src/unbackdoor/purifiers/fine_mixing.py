"""Fine-mixing: part of the suspect's weights go back to the pre-trained ones, then all are tuned."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._mixing.choosing import least_changed, most_active
from unbackdoor._mixing.masks import mask, mix
from unbackdoor._mixing.merging import sign_elected
from unbackdoor._models.adapters import carries_adapter, refuse_adapter
from unbackdoor._models.units import mean_answer
from unbackdoor._models.weight_norms import settle_spectral_norms_
from unbackdoor._purification.run import Run
from unbackdoor._purification.selection import smallest_within
from unbackdoor._value import value
from unbackdoor.purifiers._counterparts import Weights, counterparts, distinct, heads, of_proxy


@value
class FineMixing:
    """Mix the suspect's weights with the pre-trained ones it came from, coordinate by coordinate, then tune.

    A backdoor is in the weights that fine-tuning changed. With m drawn for each coordinate, 1 with probability rho,

        w = m * w_suspect + (1 - m) * w_base,

    and then all weights are tuned on the clean examples. The task head, which the base lacks, stays. A smaller rho is
    safer and less accurate. If it is None, it is the smallest of 0, 0.1, ..., 1 at which clean accuracy after mixing
    and tuning, cross-validated over all clean examples, falls short of the suspect's own by no more than the margin,
    to the nearest whole example, where each class counts alike. If the standard error of that difference is larger
    than the margin, there are too few examples to measure it, and a warning says so. The grid is searched by halving,
    which assumes that accuracy rises with rho.

    Zhang, Lyu, Ma, Wang and Sun, "Fine-mixing: Mitigating Backdoors in Fine-tuned Language Models", Findings of EMNLP
    2022, https://arxiv.org/abs/2210.09545

    Args:
        rho: share of the suspect's coordinates that are kept, 0 to 1; None searches it.
        margin: clean accuracy that may be lost, 0 to 1; of a language model, nats per answer token. A purification
            should cost three points at most; 64 examples cannot show a smaller loss, as their standard error is 3 to 5
            points.
        folds: folds of the cross-validation, at least 2.
        tune: tune after mixing; with a rho and without tuning, no clean examples are needed.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts and conversations, 1e-5 for pairs of image and caption.
        batch_size: examples per step, at least 2; None is 128 for images, 16 for texts, 8 for conversations and 64 for
            pairs.
        select: which coordinates go back: `random` ones; `largest-change`, those of each tensor that moved farthest;
            `low-activation`, the units of each linear layer that clean examples activate least (the rest at random).
        mode: `mask`; `linear` for rho * w_suspect + (1 - rho) * w_base; `spherical` for the point at that share of
            the arc between the two tensors, taken as vectors; or `sign-elected` (TIES), which needs a second model
            tuned from the base, as `proxy`: of each of the two changes the largest numbers stay, rho of them, and where
            they differ in sign, that of their sum is elected. An adapter is mixed with its base by `linear`, which is
            a smaller alpha.
        fill: `base`, or `zero` for weight matrices without any base, as in pruning.
        freeze_filled: tuning does not change the coordinates that went back.

    Differences from the paper: its body could not be read. Bernoulli masks, the head kept from the suspect, the grid,
    and how rho is chosen are this project's choices; so are both readings of its selective variant (`select`). Mixing
    is also offered for images.
    """

    rho: Annotated[float | None, Field(ge=0, le=1)] = None
    margin: Annotated[float, Field(ge=0, le=1)] = 0.03
    folds: Annotated[int, Field(ge=2)] = 4
    tune: bool = True
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None
    select: Literal["random", "largest-change", "low-activation"] = "random"
    mode: Literal["mask", "linear", "spherical", "sign-elected"] = "mask"
    fill: Literal["base", "zero"] = "base"
    freeze_filled: bool = False

    # The first version accepted a loss within the standard error, and so chose the smallest rho if examples were few.
    # The second accepted a model that gives all examples one class, if most of them are of that class. In the third
    # each example counted alike, so that a model that knew little of a small class passed.
    version: ClassVar[int] = 4

    @property
    def needs_clean(self) -> bool:
        """Whether the method uses clean examples."""
        return self.tune or self.rho is None or self.select == "low-activation"

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        if self.mode != "mask" and (self.select != "random" or self.freeze_filled):
            raise UnbackdoorError(
                f"FineMixing.mode {self.mode} changes all coordinates; leave select and freeze_filled out."
            )
        return self.mixed_(model, clean, run, self)

    def mixed_(self, model: nn.Module, clean: Dataset, run: Run, owner: object) -> nn.Module:
        """Purify in place as a part of another method, the owner, whose name is used in messages."""
        suspect = {name: tensor.detach().clone() for name, tensor in distinct(model).items()}
        base = self._base(model, suspect, run, owner)
        proxy = of_proxy(suspect, base, run, owner) if self.mode == "sign-elected" else {}
        activity = mean_answer(model, clean, run.arithmetic) if self.select == "low-activation" else {}

        def mixed_and_tuned(rho: float, examples: Dataset, words: str) -> nn.Module:
            weights, kept = self._mixed(suspect, base, proxy, activity, rho, run.seed)
            model.load_state_dict({**suspect, **weights}, strict=False)  # a tied tensor is named once
            settle_spectral_norms_(model)
            if self.tune:
                self._tune(model, examples, run, weights, kept, words)
            return model

        rho = self.rho
        if rho is None:
            rho = smallest_within(
                model,
                clean,
                run,
                margin=self.margin,
                folds=self.folds,
                field="rho",
                tuned=mixed_and_tuned,
            )
        return mixed_and_tuned(rho, clean, "tuning")

    def _base(self, model: nn.Module, suspect: Weights, run: Run, owner: object) -> Weights:
        """Returns the values that coordinates go back to, by the suspect's names, without the task head."""
        if self.mode == "linear" and carries_adapter(model):  # W + rho * B A is what a smaller alpha gives
            return {name: torch.zeros_like(weight) for name, weight in suspect.items() if ".lora_B." in name}
        refuse_adapter(model, owner, "take its `mode` linear, or load it with `merge`")
        if self.fill == "zero":
            if run.base is not None:
                run.warn("FineMixing.fill zero takes nothing from a base: the given one was not used.")
            stays = heads(suspect, run)
            matrices = (name for name, weight in suspect.items() if weight.ndim > 1 and name not in stays)
            return {name: torch.zeros_like(suspect[name]) for name in matrices}
        return counterparts(suspect, run, owner)

    def _mixed(
        self, suspect: Weights, base: Weights, proxy: Weights, activity: Weights, rho: float, seed: int
    ) -> tuple[Weights, Weights]:
        """Returns the mixed tensors, and which of their coordinates stayed the suspect's."""
        weights, kept = {}, {}
        for name, filling in base.items():
            weight = suspect[name]
            if self.mode == "sign-elected":
                models = [weight.cpu(), proxy[name].cpu()]
                if weight.is_floating_point():
                    weights[name] = sign_elected(filling.cpu().to(weight.dtype), models, rho).to(weight.device)
                continue
            if self.mode != "mask" or not weight.is_floating_point():
                weights[name] = mix(weight.cpu(), filling.cpu(), name, rho, seed, self.mode).to(weight.device)
                continue
            if self.select == "largest-change":
                kept[name] = least_changed(weight, filling, rho)
            elif (owner := name.rpartition(".")[0]) in activity:
                kept[name] = most_active(weight, activity[owner], rho)
            else:
                kept[name] = mask(name, weight.shape, rho, seed).to(weight.device)
            weights[name] = torch.where(kept[name], weight, filling.to(weight.dtype))
        return weights, kept

    def _tune(
        self, model: nn.Module, clean: Dataset, run: Run, weights: Weights, kept: Weights, description: str
    ) -> None:
        parameters = dict(model.named_parameters())

        def refill_() -> None:
            for name in kept.keys() & parameters.keys():
                parameters[name].copy_(torch.where(kept[name], parameters[name], weights[name]))

        run.tune(
            model,
            clean,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            after_step=refill_ if self.freeze_filled else None,
            description=description,
        )
