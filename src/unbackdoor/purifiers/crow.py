"""CROW: neighbouring blocks of a language model leave alike states, also if the embeddings are perturbed."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._data.texts import Tokens
from unbackdoor._models.decoder_blocks import decoder_blocks
from unbackdoor._purification.run import Run
from unbackdoor._training.recipe import Defaults
from unbackdoor._value import value
from unbackdoor.purifiers._consistency import Stack
from unbackdoor.purifiers._low_rank import low_rank

_PRESETS: dict[str, dict[str, Any]] = {
    "safe": {"epsilon": 1.0, "unit": "relative", "learning_rate": 2e-4},
    "published": {"epsilon": 0.1, "unit": "absolute", "learning_rate": 1e-3},
}


@value
class CROW:
    """Tune matrices of low rank so that blocks turn their states little, also if a perturbation turns them most.

    A trigger makes the states of a language model change abruptly between blocks; clean text changes them gradually.
    With h(l) the state after block l of L, CROW minimises

        CE + alpha * D(e + delta),   D(e) = mean over l = 1 .. L - 2 and all tokens of 1 - cos(h(l), h(l + 1)),

    where e are the embeddings of the tokens, and delta = epsilon * sign(dD / de) is a constant. One forward and
    backward pass finds delta, another one penalises D.

    Min, Pham, Li and Sun, "CROW: Eliminating Backdoors from Large Language Models via Internal Consistency
    Regularization", ICML 2025, https://arxiv.org/abs/2411.12768

    Args:
        preset: `safe` or `published`: the values of epsilon, its unit and the learning rate if these are left open.
        alpha: weight of D, at least 0; 0 is LoRATuning.
        epsilon: size of the perturbation, at least 0; None is 1 for `safe` and 0.1 for `published`.
        unit: unit of epsilon: `absolute`, or `relative` to the root mean square of the embeddings; None is `relative`
            for `safe` and `absolute` for `published`.
        rank: rank of the matrices, 1 to 4,096; an adapter keeps its own rank and scale.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 2e-4 for `safe` and 1e-3 for `published`
            (AdamW).
        batch_size: examples per step, at least 2; None is 8.

    Differences from the paper: its body could not be read; this follows the authors' script, without its defects. The
    script wipes the gradients of all but the last micro-batch of a step, counts padding, needs frozen embeddings, and
    may compute delta in half precision, where small derivatives are 0. An absolute epsilon means something else for
    each model, so `safe` has a relative one. The rate falls linearly to 0, without a warm-up; the script's falls by a
    cosine after one. A model that is not an adapter gets matrices next to all linear layers but the head, which are
    added to these in the end.
    """

    preset: Literal["safe", "published"] = "safe"
    alpha: Annotated[float, Field(ge=0)] = 5.5
    epsilon: Annotated[float | None, Field(ge=0)] = None
    unit: Literal["absolute", "relative"] | None = None
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    defaults: ClassVar[Defaults] = {"conversations": {"learning_rate": 2e-4}}

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        stack = Stack(model, decoder_blocks(model, self, least=3), run.arithmetic)
        zeros: list[float] = []

        def step(batch: Batch) -> None:
            zeros.append(self.fill(model, stack, batch, run))

        with low_rank(model, run, self, rank=self.rank):
            run.tune(
                model,
                clean,
                epochs=self.epochs,
                learning_rate=self.chosen("learning_rate"),
                batch_size=self.batch_size,
                gradients=step,
            )
        if self.alpha:
            run.note(f"CROW: {sum(zeros) / len(zeros):.1%} of the signs of its perturbations were 0.")
        return model

    def fill(self, model: nn.Module, stack: Stack, batch: Batch, run: Run) -> float:
        """Fill the gradients of the parameters for a batch; returns the share of the perturbation that is 0."""
        run.task.loss(run.scores(model, batch.inputs), batch).backward()
        if not self.alpha:
            return 0.0
        assert isinstance(batch.inputs, Tokens)
        delta, share = stack.perturbation(batch.inputs, self.chosen("epsilon"), self.chosen("unit"))
        turned, _ = stack.turning(batch.inputs, delta)
        (self.alpha * turned).backward()
        return share

    def chosen(self, field: str) -> Any:
        """Returns the value of a field, or the preset's if it was left open."""
        setting = getattr(self, field)
        return _PRESETS[self.preset][field] if setting is None else setting
