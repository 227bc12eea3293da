"""Pairs: the smallest patch that moves examples of one class to another."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._detection.outliers import outlier_p_values
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.masks import MaskedPatch
from unbackdoor._inversion.smallest import SmallestSearch
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.detectors._smallest import comparable_sizes, with_control


@value
class Pairs:
    """Search the smallest mask m and pattern p for pairs of a source class s and a target class t.

        min CE(f((1 - m) x + m p), t) + cost |m|_1    over examples x of class s

    A pair whose mask is far smaller than those of the others has a shortcut of its own. Searches over all classes at
    once do not find it if it moves examples of s alone.

    If there are more than `pairs` pairs, those are searched whose examples the model holds to be most like the target:
    the pairs with the largest mean of z_t - z_s over the examples of s, where z are the class scores. That is the
    cheap pre-screen of Shen et al., "Backdoor Scanning for Deep Neural Networks through K-Arm Optimization", ICML 2021,
    https://arxiv.org/abs/2102.05123; the search is that of Wang et al., "Neural Cleanse: Identifying and Mitigating
    Backdoor Attacks in Neural Networks", IEEE S&P 2019, https://doi.org/10.1109/SP.2019.00031.

    Cannot see: triggers over the whole picture, warps, triggers that differ between pictures, and shortcuts of many
    pairs at once (they hide each other).

    Args:
        pairs: that are searched at most, at least 1.
        steps: steps of the search, at least 1; each sees one batch for every pair.
        batch_size: examples per step and pair, at least 2.
        cost: weight of a mask's size at first, more than 0.
        success: share of a batch that a trigger must move to its class, more than 0 and at most 1.
        patience: steps in a row before a pair's weight changes, at least 1.

    Differences from the paper: all pairs are searched at once, not one after the other by a bandit. The rule of the
    paper, a mask of a fixed number of pixels and the size ratio of a pair and its reverse, is replaced: the logarithms
    of the sizes are compared over the pairs, leaving out one in turn.
    """

    pairs: Annotated[int, Field(ge=1)] = 100
    steps: Annotated[int, Field(ge=1)] = 40
    batch_size: Annotated[int, Field(ge=2)] = 5
    cost: Annotated[float, Field(gt=0)] = 1e-3
    success: Annotated[float, Field(gt=0, le=1)] = 0.8
    patience: Annotated[int, Field(ge=1)] = 5

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Search the pairs, and return the strongest of each target class.

        Raises:
            UnbackdoorError: the model gives no finite class scores.
        """
        family = MaskedPatch()
        search = SmallestSearch.of(self, family, learning_rate=0.1)
        pairs = likely_pairs(model, clean, run, self.pairs)
        if len(pairs) == 0:
            raise UnbackdoorError(
                f"Pairs ranks pairs of classes by their scores on {clean.name}, and the model gives no finite ones. "
                "Leave pairs out."
            )
        triggers = search(model, clean, run, pairs)
        strengths = -comparable_sizes(triggers, family).clamp(min=1e-6).log()
        nominal = outlier_p_values(strengths.cpu())
        candidates = []
        for target in pairs[:, 1].unique().tolist():
            rows = (pairs[:, 1] == target).nonzero().flatten()
            best = int(rows[strengths[rows].argmax()])
            source = int(pairs[best, 0])
            trigger, control = with_control(family, triggers.parameters[best], target, (source,), run.generator)
            candidates.append(
                Candidate(
                    target=target,
                    strength=float(strengths[best]),
                    size=math.exp(-float(strengths[best])),
                    trigger=trigger,
                    control=control,
                    sources=(source,),
                    nominal_p=float(nominal[best]),
                )
            )
        return Finding(candidates=tuple(candidates), unit=family.unit(clean.shape))


def likely_pairs(model: nn.Module, clean: Dataset, run: Run, count: int) -> Tensor:
    """The pairs of a source and a target whose source looks most like the target to the model, (pairs, 2).

    They are those with the largest mean of z_target - z_source over the examples of the source, in the order of their
    numbers; a class without examples is not a source.

    Args:
        model: in its present state.
        clean: labelled examples.
        run: arithmetic.
        count: of the pairs, at most.
    """
    with torch.no_grad():
        parts = [run.scores(model, batch.inputs) for batch in clean.batches(run.arithmetic.evaluation_batch)]
    scores = torch.cat(parts)
    classes = scores.shape[1]
    own = scores.gather(1, clean.labels[:, None])
    gaps = torch.stack([(scores - own)[clean.labels == label].mean(dim=0) for label in range(classes)])
    gaps = gaps.fill_diagonal_(-torch.inf).nan_to_num(nan=-torch.inf, neginf=-torch.inf).flatten()
    chosen = gaps.topk(min(count, int(gaps.isfinite().sum()))).indices.sort().values
    return torch.stack([chosen // classes, chosen % classes], dim=1).cpu()
