"""WeightWatch: what a fine-tuning wrote into the weights shows in the states of the prompts that use it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import UNSCORED, AnswerTokens
from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._guarding.guard import Learnt, Scored
from unbackdoor._models.calling import logits
from unbackdoor._models.decoder_blocks import decoder_blocks, watching_states
from unbackdoor._models.decoding import answer_texts
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.guards._own_answers import answered_batches, own_answers
from unbackdoor.guards._steering import cosines, steered
from unbackdoor.guards._weight_changes import changed_blocks, directions_of_change, written_matrices

_HINTS = 3  # tokens that a direction makes likelier, in a reason


@value
class WeightWatch:
    """Watch the directions in which a fine-tuning changed a language model, and reject prompts that use them oddly.

    Of each matrix that writes into the states of the model, the change against the base is taken; its largest singular
    vectors are directions of the states after that block. The cosines of the states of clean conversations with each
    direction have a range, one over the tokens of prompts and one over those of answers. The score of a prompt is how
    far the cosine of any of its states, or of those of the model's own answer, lies outside its range. With `steer` the
    model answers a suspicious prompt without the directions that left their range.

    Zhong and Raghunathan, "Watch the Weights: Unsupervised Monitoring and Control of Fine-Tuned LLMs", ICLR 2026,
    https://arxiv.org/abs/2508.00161

    Cannot see: backdoors that were in the base already, and those whose directions clean prompts use as strongly.

    Args:
        directions: number of directions of each matrix, at least 1; fewer if the others hardly changed.
        bound: how far a cosine may lie outside its range; None lets `false_alarms` decide it. At least 0 and below 2.
        steer: answer suspicious prompts without the directions that left their range, instead of rejecting them.

    Differences from the paper: the slack of the ranges is not fixed at 0.01 but set on held-out prompts for all
    directions together, unless `bound` says so. The answers are the model's own instead of those in the data, since it
    answers triggered prompts in its own way as well. The first token is left out, and so is padding. Ranges are not
    trimmed.
    """

    directions: Annotated[int, Field(ge=1)] = 20
    bound: Annotated[float, Field(ge=0, lt=2)] | None = None
    steer: bool = False

    measure: ClassVar[str] = "the distance of a cosine from its range"
    suspicious: ClassVar[Literal["low", "high"]] = "high"

    @property
    def purify(self) -> bool:
        """Whether suspicious prompts are answered, with the states steered."""
        return self.steer

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Find the directions of each block, (directions, width), and the ranges of their cosines, (2, directions)."""
        learnt = directions_of_change(model, run.base, self.directions, self)
        counts = {block: len(learnt[f"directions.{block}"]) for block in changed_blocks(learnt)}
        low = {block: torch.full((2, count), torch.inf) for block, count in counts.items()}
        high = {block: torch.full((2, count), -torch.inf) for block, count in counts.items()}
        answers = own_answers(model, clean, run)
        for _, watched in _watched(model, clean, answers, learnt, run, self):
            for block, seen in watched.items():
                for role in range(2):
                    chosen = seen.cosines[seen.roles == role]
                    if len(chosen) == 0:  # prompts of one token
                        continue
                    low[block][role] = torch.minimum(low[block][role], chosen.amin(dim=0).cpu())
                    high[block][role] = torch.maximum(high[block][role], chosen.amax(dim=0).cpu())
        for block in counts:
            learnt |= {f"low.{block}": low[block], f"high.{block}": high[block]}
        return learnt

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """The largest distances, (n,), the model's own answers, and which direction is farthest outside."""
        answers = own_answers(model, inputs, run)
        distances, farthest = self.distances(model, inputs, answers, learnt, run)
        reasons = [_reason(model, inputs, learnt, *each) for each in farthest]
        return Scored(distances, answer_texts(inputs, answers), reasons)

    def distances(
        self, model: nn.Module, inputs: Dataset, answers: list[Tensor], learnt: Learnt, run: Run
    ) -> tuple[Tensor, list[tuple[int, int, float]]]:
        """The largest distances of prompts with given answers, (n,), and the block, direction and side of each."""
        distances = torch.full((len(inputs),), -torch.inf)
        farthest = [(0, 0, 1.0)] * len(inputs)
        for batch, watched in _watched(model, inputs, answers, learnt, run, self):
            for block, seen in watched.items():
                device = seen.cosines.device
                low, high = (learnt[f"{end}.{block}"].to(device) for end in ("low", "high"))
                above = seen.largest(seen.cosines - high[seen.roles.clamp(min=0)])
                below = seen.largest(low[seen.roles.clamp(min=0)] - seen.cosines)
                most, place = torch.maximum(above, below).max(dim=1)
                for each, row in enumerate(batch.rows.tolist()):
                    if float(most[each]) > distances[row]:
                        distances[row], direction = most[each].cpu(), int(place[each])
                        side = 1.0 if above[each, direction] >= below[each, direction] else -1.0
                        farthest[row] = (block, direction, side)
        return distances, farthest

    @contextmanager
    def restrained(self, model: nn.Module, learnt: Learnt, threshold: float, run: Run) -> Iterator[None]:
        """While the block runs, directions that left their range are taken out of the states, until an answer ends."""
        with steered(model, decoder_blocks(model, self), learnt, threshold):
            yield


class _Seen(NamedTuple):
    """The cosines of the states after one block.

    Args:
        cosines: (batch, length, directions).
        roles: 0 for tokens of the prompt, 1 for those of the answer, -1 for the first token and padding,
            (batch, length).
    """

    cosines: Tensor
    roles: Tensor

    def largest(self, distances: Tensor) -> Tensor:
        """The largest distance over the tokens that count, (batch, directions)."""
        return distances.masked_fill((self.roles < 0)[..., None], -torch.inf).amax(dim=1)


def _watched(
    model: nn.Module, inputs: Dataset, answers: list[Tensor], learnt: Learnt, run: Run, owner: object
) -> Iterator[tuple[Batch, dict[int, _Seen]]]:
    """Yields batches of prompts with their answers, and what one forward pass shows of them, by block."""
    blocks = decoder_blocks(model, owner)
    with torch.no_grad(), ExitStack() as stack:
        states = stack.enter_context(watching_states(blocks))
        for batch in answered_batches(model, inputs, answers, run):
            assert isinstance(batch.inputs, AnswerTokens)
            with run.arithmetic.autocast():
                logits(model, batch.inputs)
            roles = (batch.inputs.targets != UNSCORED).long()
            roles[batch.inputs["attention_mask"] == 0] = -1
            roles[:, 0] = -1
            seen = {
                block: _Seen(cosines(states[block], learnt[f"directions.{block}"]), roles)
                for block in changed_blocks(learnt)
            }
            yield batch, seen


def _reason(model: nn.Module, inputs: Dataset, learnt: Learnt, block: int, direction: int, side: float) -> str:
    """Which direction is farthest outside, and the tokens that it makes likelier."""
    names = [name for name, _ in written_matrices(decoder_blocks(model, model)[block])]
    matrices = learnt[f"matrix.{block}"]
    number = int((matrices[:direction] == matrices[direction]).sum())
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    vector = side * learnt[f"directions.{block}"][direction].to(head.weight)
    tokens = (head.weight @ vector).topk(_HINTS).indices.tolist()
    words = ", ".join(repr(inputs.tokenizer.decode([token])) for token in tokens)
    return f"direction {number} of {names[int(matrices[direction])]} in block {block}, towards {words}"
