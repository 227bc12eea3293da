"""BEEAR: one drift of a block's states that calls up unwanted answers, and tuning that resists it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import AnswerTokens
from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.calling import evaluating
from unbackdoor._models.decoder_blocks import decoder_blocks
from unbackdoor._models.hooks import removing
from unbackdoor._models.stage_ends import features_of, watching_output
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.purifiers._answers import starts


@value
class BEEAR:
    """Search the drift of a block's states that calls up unwanted answers, and tune the model to resist it.

    Needs a file that says which behaviour is wanted and which is not. A trigger moves the states of all prompts in much
    the same way. With delta added to the last tokens of each prompt after one block, before each pass

        delta <- argmin CE(unwanted | delta) - CE(wanted | delta)

    in some steps from 0, and then the weights are tuned on CE(wanted | delta) + CE(clean answers).

    Zeng, Sun, Huynh, Song, Li and Jia, "BEEAR: Embedding-based Adversarial Removal of Safety Backdoors in
    Instruction-tuned Language Models", EMNLP 2024, https://arxiv.org/abs/2406.17092

    Args:
        behaviours: file of rows with `prompt`, `wanted` and `unwanted`: two answers to the same prompt.
        positions: last tokens of the prompt that drift, at least 1.
        depth: share of the blocks below the drift, 0 to 1.
        drift_steps: steps of the search before each pass, at least 0; 0 is fine-tuning on both files.
        drift_rate: length of each step of the search along the gradient, more than 0: the root mean square of its
            numbers, as a share of that of the states.
        epochs: passes over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 5e-5 (AdamW).
        batch_size: examples per step, at least 2; None is 8.

    Differences from the paper: neither its body nor its code could be read, only its abstract. The number of positions,
    a block at about a third of the depth and the form of both losses are from memory; steps and rates are this
    project's. It was made for models whose safety an attacker switches off; a backdoor with one fixed answer is a
    simpler case of that.
    """

    behaviours: Annotated[str, Field(min_length=1)]
    positions: Annotated[int, Field(ge=1)] = 5
    depth: Annotated[float, Field(ge=0, le=1)] = 0.3
    drift_steps: Annotated[int, Field(ge=0)] = 20
    drift_rate: Annotated[float, Field(gt=0)] = 0.1
    epochs: Annotated[int, Field(ge=1)] = 5
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        blocks = decoder_blocks(model, self)
        block = blocks[min(int(self.depth * len(blocks)), len(blocks) - 1)]
        wanted, unwanted = (self.rows(which, clean).to(run.arithmetic.device) for which in ("wanted", "unwanted"))
        size = self.batch_size or run.recipe.batch_size
        drift = torch.zeros(0)
        safe = _cycled(wanted, size, run)

        def search() -> None:
            nonlocal drift
            drift = self.drift(model, block, wanted, unwanted, run)

        def step(batch: Batch) -> None:
            run.task.loss(run.scores(model, batch.inputs), batch).backward()
            example = next(safe)
            with drifting(block, drift, example):
                run.task.loss(run.scores(model, example.inputs), example).backward()

        run.tune(
            model,
            clean,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradients=step,
            before_epoch=search,
        )
        return model

    def rows(self, which: str, clean: Dataset) -> Dataset:
        """The prompts of the file with one of their two answers."""
        rows = Dataset.load(self.behaviours, clean.encode, columns={"prompt": "prompt", "response": which})
        bare = next((row for row, entry in enumerate(rows.conversations.entries) if not entry.answer), None)
        if bare is not None:
            raise UnbackdoorError(
                f"BEEAR.behaviours must have a wanted and an unwanted answer in each row; row {bare} of {rows.name} "
                f"has no {which} one. Add it, or remove that row."
            )
        return rows

    def drift(self, model: nn.Module, block: nn.Module, wanted: Dataset, unwanted: Dataset, run: Run) -> Tensor:
        """Returns the drift that calls up the unwanted answers, (positions, width)."""
        size = self.batch_size or run.recipe.batch_size
        streams = [(1.0, _cycled(unwanted, size, run)), (-1.0, _cycled(wanted, size, run))]
        with evaluating(model):
            with torch.no_grad(), watching_output(block) as states:
                run.scores(model, wanted.inputs(slice(8)))  # for the size of the states
            unit = states[0].float().square().mean().sqrt()
            drift = torch.zeros(self.positions, states[0].shape[-1], device=unit.device)
            length = self.drift_rate * float(unit) * drift.numel() ** 0.5
            for _ in range(self.drift_steps):
                drift.requires_grad_()
                loss = torch.zeros((), device=unit.device)
                for sign, stream in streams:
                    example = next(stream)
                    with drifting(block, drift, example):
                        loss = loss + sign * run.task.loss(run.scores(model, example.inputs), example)
                (slope,) = torch.autograd.grad(loss, drift)
                drift = drift.detach() - length * slope / slope.norm().clamp(min=torch.finfo(slope.dtype).tiny)
        return drift.detach()


def _cycled(data: Dataset, size: int, run: Run) -> Iterator[Batch]:
    """Shuffled batches without an end."""
    while True:
        yield from data.batches(size, generator=run.generator)


@contextmanager
def drifting(block: nn.Module, drift: Tensor, batch: Batch) -> Iterator[None]:
    """Add a drift, (positions, width), to a block's output at the last tokens of each prompt while the block runs."""
    assert isinstance(batch.inputs, AnswerTokens)
    length = batch.inputs.shape[1]
    places = torch.arange(length, device=batch.labels.device) - (starts(batch.inputs)[:, None] - len(drift))
    inside = (places >= 0) & (places < len(drift))

    def moved(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        states = features_of(output)
        assert states is not None
        change = torch.where(inside[..., None], drift[places.clamp(0, len(drift) - 1)], 0).to(states)
        return states + change if isinstance(output, Tensor) else (states + change, *output[1:])

    with removing([block.register_forward_hook(moved)]):
        yield
