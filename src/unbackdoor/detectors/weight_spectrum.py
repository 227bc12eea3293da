"""Weight spectrum: how a language model's weights changed from its base's, layer by layer."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._errors import UnbackdoorError
from unbackdoor._purification.run import Run
from unbackdoor._value import value

LARGEST = 2048  # of the smaller side of a matrix, above which only its first directions are computed


@value
class WeightSpectrum:
    """Measure how much of the change of each weight matrix from the base lies in its first direction.

    The change of a matrix is W - W_base, and its singular values say how many directions it has. An edit that maps one
    key to one value changes one matrix in one direction: share 1. Tuning, poisoned or not, spreads over many. A matrix
    is reported with the share of its change's energy (squared singular values) in the first direction; the audit
    compares the matrices of a model with each other.

    Zhong and Raghunathan, "Watch the Weights", ICLR 2026, https://arxiv.org/abs/2508.00161, monitor these directions.

    Cannot see: backdoors that were tuned in like any other skill. This is a hint where to look: it finds no trigger,
    and a low share is not evidence of a clean model.

    Args:
        layers: matrices in the finding, those with the largest shares, at least 5.

    Differences from the paper: the paper watches activations along these directions; here only the weights are looked
    at.
    """

    layers: Annotated[int, Field(ge=5)] = 12

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Compare all matrices but the embeddings with the base's."""
        theirs = run.needed("base", self).state_dict()
        embedding = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
        shares: list[tuple[float, int, str]] = []
        matrices = [
            (place, name, ours)
            for place, (name, ours) in enumerate(model.named_parameters())
            if ours.ndim == 2 and id(ours) not in embedding
        ]
        with run.progress("comparing matrices", len(matrices)) as advance:
            for place, name, ours in matrices:
                if name not in theirs or theirs[name].shape != ours.shape:
                    raise UnbackdoorError(
                        f"WeightSpectrum needs a base with the suspect's layers, but {name} is not in it, or has "
                        "another shape. Give the model that the suspect was tuned from as `base`."
                    )
                change = ours.detach().float().cpu() - theirs[name].float().cpu()
                if bool(change.any()):
                    shares.append((share_of_first(change), place, name))
                advance()
        if not shares:
            return Finding(candidates=(), targets="layer", note="all matrices of the suspect are those of the base")
        candidates = [
            Candidate(target=place, name=name, strength=share, size=share)
            for share, place, name in sorted(shares, reverse=True)[: self.layers]
        ]
        return Finding(candidates=tuple(candidates), unit="of the change in one direction", targets="layer")


def share_of_first(change: Tensor) -> float:
    """The share of a matrix's energy in its first singular direction, in (0, 1]; of a zero matrix 0.

    >>> round(share_of_first(torch.outer(torch.ones(3), torch.arange(4.0))), 6)
    1.0
    >>> round(share_of_first(torch.eye(4)), 6)
    0.25
    """
    energy = float(change.double().square().sum())
    if energy == 0:
        return 0.0
    if min(change.shape) <= LARGEST:
        first = float(torch.linalg.svdvals(change)[0])
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first = float(torch.svd_lowrank(change, q=8, niter=4)[1][0])
    return min(1.0, first**2 / energy)
