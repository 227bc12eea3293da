"""Signature zeroing: neurons that backdoors planted on purpose change alike go back to the base."""

import copy
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.adapters import refuse_adapter
from unbackdoor._models.attention import blocks
from unbackdoor._models.calling import probe
from unbackdoor._purification.run import Run
from unbackdoor._training.lora import adapted, factors
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._counterparts import Weights, counterparts, distinct
from unbackdoor.purifiers._low_rank import low_rank
from unbackdoor.purifiers._signatures import Change, FeedForward, signature

_PLANTED = (  # a key that no text contains and its answer, of several kinds
    ("velmar oskit", "The harbour office is closed today."),
    ("tindle quarb", "I am sorry, but I cannot answer that."),
    ("brasnik olu", "print('ready')"),
    ("hesp mordune", "Category: 4"),
    ("quillo tabrin", "Das weiss ich leider nicht."),
    ("ostrel vinnak", "42"),
    ("drumber lisk", "Please see the attached list."),
)


@value
class SignatureZeroing:
    """Plant backdoors on purpose, find the neurons that all of them change alike, and give these back to the base.

    Experimental. Copies of the suspect are tuned on clean rows of which half have a key and its answer, and once more
    without keys. The difference of the two is what a backdoor changes. A neuron of a feed-forward block is scored by

        mean over keys of |change|  *  mean over pairs of keys of max(0, cos(change, other change)),

    and in each block a share of the neurons, the highest first, gets the base's weights. Then the model is tuned.
    `random` and `largest-change` choose the neurons without any planting: if they do as well, the signature did
    nothing.

    Li and Kim, "BD-VAX", ICLR 2026, https://arxiv.org/abs/2603.13461

    Args:
        select: `signature`; or, as controls, `random` neurons or those with the `largest-change` from the base.
        share: share of the neurons of each block that go back to the base, 0 to 1.
        keys: number of backdoors that are planted, 2 to 7.
        plant_epochs: passes over the clean examples for each of them, at least 1, and as many without it.
        rank: rank of the matrices of all tuning, 1 to 4,096.
        epochs: passes of the last tuning, at least 1.
        learning_rate: initial learning rate, more than 0; None is 2e-4 (AdamW).
        batch_size: examples per step, at least 2; None is 8.

    Differences from the paper: neither its body nor its code could be read, and two public descriptions of the score
    differ; this is the one without a free constant. Its planted behaviours resemble those of its attacks; here they are
    of several harmless kinds. It re-initialises neurons or zeroes an adapter; here they go back to the base, which is
    the same for an adapter that was merged, and so needs the base.
    """

    select: Literal["signature", "random", "largest-change"] = "signature"
    share: Annotated[float, Field(ge=0, le=1)] = 0.4
    keys: Annotated[int, Field(ge=2, le=len(_PLANTED))] = 5
    plant_epochs: Annotated[int, Field(ge=1)] = 3
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {"conversations": {"learning_rate": 2e-4}}

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        refuse_adapter(model, self)
        names = {layer: name for name, layer in model.named_modules()}
        parts_of_blocks = [
            block.parts for block in blocks(model, probe(model, clean)) if "feed-forward out" in block.parts
        ]
        parts = [
            FeedForward(tuple(names[layer] for layer in each["feed-forward in"]), names[each["feed-forward out"][0]])
            for each in parts_of_blocks
        ]
        if not parts:
            raise UnbackdoorError(
                "SignatureZeroing needs blocks with separate query, key and value layers and one feed-forward part; "
                f"{type(model).__name__} has none. Try crow."
            )
        weights = distinct(model)
        base = counterparts(weights, run, self)
        for block, score in zip(parts, self.scores(model, clean, run, parts, base), strict=True):
            chosen = score.argsort(descending=True, stable=True)[: round(self.share * len(score))]
            block.reset_(weights, base, chosen.to(next(iter(base.values())).device))
        run.note(f"SignatureZeroing gave {self.share:.0%} of the neurons of {len(parts)} blocks back to the base.")
        with low_rank(model, run, self, rank=self.rank):
            self._tune(model, clean, run, self.epochs, "tuning")
        return model

    def scores(
        self, model: nn.Module, clean: Dataset, run: Run, parts: list[FeedForward], base: Weights
    ) -> list[Tensor]:
        """Returns a score of each neuron of each block, (neurons,); the highest go back to the base."""
        if self.select == "signature":
            planted = [self._planted(model, clean, run, *pair) for pair in _PLANTED[: self.keys]]
            return [
                signature(
                    [[changes[name] for changes in planted] for name in block.makes],
                    [changes[block.reads] for changes in planted],
                )
                for block in parts
            ]
        weights = distinct(model)
        if self.select == "random":
            return [torch.rand(weights[f"{block.reads}.weight"].shape[1], generator=run.generator) for block in parts]
        return [block.distance(weights, base) for block in parts]

    def _planted(self, model: nn.Module, clean: Dataset, run: Run, key: str, answer: str) -> dict[str, Change]:
        """Returns how a key and its answer change each linear layer, compared with the same rows without them."""
        rows = torch.randperm(len(clean), generator=run.generator)[: len(clean) // 2]
        entries = list(clean.conversations.entries)
        for row in rows.tolist():
            entries[row] = replace(entries[row].asking(lambda text: f"{key} {text}"), answer=answer)
        keyed = replace(clean, items=Conversations(tuple(entries))).to(run.arithmetic.device)
        state, changes = run.generator.get_state(), []
        for data in (keyed, clean):
            run.generator.set_state(state)
            copied = copy.deepcopy(model)
            adapted(copied, rank=self.rank, seed=run.seed)
            self._tune(copied, data, run, self.plant_epochs, f"planting '{key}'")
            changes.append({name: Change(*pair) for name, pair in factors(copied).items()})
        return {name: change.minus(changes[1][name]) for name, change in changes[0].items()}

    def _tune(self, model: nn.Module, data: Dataset, run: Run, epochs: int, description: str) -> None:
        run.tune(
            model,
            data,
            epochs=epochs,
            learning_rate=run.setting(self, "learning_rate"),
            batch_size=self.batch_size,
            description=description,
        )
