"""BadActs: activations of an input with a trigger lie outside of where those of clean inputs do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._guarding.guard import Learnt, Scored
from unbackdoor._models.blocks import AnswerToken, answer_token, blocks, vectors, watching_blocks
from unbackdoor._models.calling import probe
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.guards._activation_bounds import BoundsSearch, cut

PLACES: tuple[AnswerToken, ...] = get_args(AnswerToken)


@value
class BadActs:
    """Compare the activations of an input with those of clean ones, in all blocks at once.

    The score is the share of an input's activations that lie within `width` standard deviations of their mean over
    clean inputs. Activations are those of the token that the model answers from, or the means of feature maps. With
    `purify`, a suspicious input is answered by the model with all activations cut to bounds, which are as narrow as the
    answers to clean inputs allow.

    Yi et al., "BadActs: A Universal Backdoor Defense in the Activation Space", Findings of ACL 2024,
    https://arxiv.org/abs/2405.11227

    Cannot see: triggers that leave activations where clean inputs have them, or move very few of them.

    Args:
        width: width of the range, in standard deviations, more than 0.
        purify: answer suspicious inputs within bounds, instead of rejecting them.
        epochs: passes over the clean examples that learn the bounds, at least 1.
        learning_rate: learning rate of the bounds, more than 0.
        kept: share of the accuracy on clean examples that the bounds should leave, at most 1. One point less is the
            least that is accepted.

    Differences from the paper: for any depth and width, and for images. Half of the clean examples are fitted on
    whether they are classified correctly or not. Where no bounds keep the accuracy after 8 tries, the smallest and the
    largest activations of clean inputs are taken; the published loop may not end.
    """

    width: Annotated[float, Field(gt=0)] = 2.0
    purify: bool = False
    epochs: Annotated[int, Field(ge=1)] = 50
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    kept: Annotated[float, Field(gt=0, le=1)] = 0.98

    measure: ClassVar[str] = "the share of ordinary activations"
    suspicious: ClassVar[Literal["low", "high"]] = "low"

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Fit mean and standard deviation of each activation, and bounds if they are asked for."""
        some = run.arithmetic.lay(probe(model, clean))
        names = blocks(model, some, run.head_name, "BadActs")
        place = answer_token(model, some, names[-1])
        learnt = {"place": torch.tensor(PLACES.index(place))}
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        with torch.no_grad(), watching_blocks(model, names) as watched:
            for batch in clean.batches(run.arithmetic.evaluation_batch):
                run.scores(model, batch.inputs)
                for name in names:
                    seen[name].append(vectors(watched[name][0], batch.inputs, place).double().cpu())
        for name, parts in seen.items():
            rows = torch.cat(parts)
            learnt[f"mean.{name}"], learnt[f"deviation.{name}"] = rows.mean(dim=0), rows.std(dim=0)
        if not self.purify:
            return learnt
        search = BoundsSearch(
            model, clean, names, run, epochs=self.epochs, learning_rate=self.learning_rate, kept=self.kept
        )
        return learnt | search.learnt()

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """The shares of ordinary activations, (n,), and the answers of the same forward pass."""
        names = [key.removeprefix("mean.") for key in learnt if key.startswith("mean.")]
        place, device = PLACES[int(learnt["place"])], run.arithmetic.device
        centres = {name: learnt[f"mean.{name}"].to(device) for name in names}
        # Rounding makes a constant activation differ a little from its mean.
        reach = {
            name: self.width * learnt[f"deviation.{name}"].to(device) + 1e-5 * (1 + centres[name].abs())
            for name in names
        }
        count = sum(map(len, centres.values()))
        shares, answers, rows = [], [], []
        with watching_blocks(model, names) as watched:
            for batch in inputs.batches(run.arithmetic.evaluation_batch):
                answers.append(run.scores(model, batch.inputs))
                ordinary = torch.zeros(len(batch.labels), dtype=torch.int64, device=device)
                for name in names:
                    activations = vectors(watched[name][0], batch.inputs, place)
                    ordinary += ((activations - centres[name]).abs() <= reach[name]).sum(dim=1)
                shares.append(ordinary.double() / count)
                rows.append(batch.rows)
        order = torch.cat(rows).argsort()
        return Scored(torch.cat(shares)[order], torch.cat(answers)[order])

    @contextmanager
    def restrained(self, model: nn.Module, learnt: Learnt, threshold: float, run: Run) -> Iterator[None]:
        """While the block runs, the activations of all blocks are cut to the bounds."""
        names = [key.removeprefix("low.") for key in learnt if key.startswith("low.")]
        with cut(model, {name: (learnt[f"low.{name}"], learnt[f"high.{name}"]) for name in names}):
            yield
