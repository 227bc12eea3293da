"""Checks that a base is the model that a suspect was tuned from."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from unbackdoor._models.matching import Matching, Shape, matrices

SAMPLE = 2**16  # numbers of a matrix that a check of ancestry compares


def doubts(
    pairs: Iterable[tuple[str, Tensor, Tensor]],
    matching: Matching,
    suspect: Mapping[str, Shape],
    base: Mapping[str, Shape],
) -> list[str]:
    """Returns reasons to doubt that a base is the suspect's ancestor, from `ancestry` and `other_depth`."""
    warnings = (ancestry(pairs), other_depth(matching, suspect, base))
    return [warning for warning in warnings if warning is not None]


def other_depth(matching: Matching, suspect: Mapping[str, Shape], base: Mapping[str, Shape]) -> str | None:
    """Returns a warning with numbers if more matrices lack a counterpart than a pooler or a head would explain.

    Args:
        matching: the pairs of the two.
        suspect: the suspect's shapes by name.
        base: the base's shapes by name.
    """
    ours, theirs = matrices(suspect), matrices(base)
    left, unused = len(ours - matching.pairs.keys()), len(theirs - set(matching.pairs.values()))
    if max(left, unused) <= max(2, len(ours) // 10):
        return None
    return (
        f"model and base differ in architecture: apart from embeddings, {left} of the model's {len(ours)} matrices "
        f"stay unchanged, since the base has none for them, and {unused} of the base's {len(theirs)} are not used. "
        "Unchanged matrices keep their part of a backdoor. Take the pre-trained model that it came from."
    )


def split_output(output: str) -> str:
    """Returns a warning for a base with an output matrix of its own, where the suspect's output is its embeddings.

    Args:
        output: name of that matrix in the base.
    """
    return (
        f"the base has an output matrix of its own ({output}), and the model's output matrix is its embeddings, which "
        "go back to the base's embeddings: the less of the model is kept, the less the result can answer as the base "
        "does. Take the pre-trained model that it came from."
    )


def ancestry(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> str | None:
    """Check that a base is the suspect's ancestor: fine-tuned weights stay close to those they came from.

    Of each matrix, up to 2^16 coordinates from its middle are compared.

    Args:
        pairs: name, the suspect's tensor, the base's.

    Returns:
        A warning with numbers if the weights are as far apart as those of unrelated models, or all equal.
    """
    correlations, distances, counts = [], [], []
    for _, suspect, base in pairs:
        if suspect.ndim < 2 or not suspect.is_floating_point():
            continue
        ours, theirs = _sample(suspect), _sample(base)
        length = ours.norm() * theirs.norm()
        if length == 0:
            continue
        distances.append(float((ours - theirs).norm() / ours.norm()))
        ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        length = ours.norm() * theirs.norm()
        correlations.append(float(ours @ theirs / length) if length > 0 else 1.0)
        counts.append(len(ours))
    if not correlations:
        return None
    correlation, distance = float(np.median(correlations)), float(np.median(distances))
    chance = 1 / math.sqrt(float(np.median(counts)))
    if max(distances) == 0:
        return (
            f"the {len(distances)} matrices that model and base have in common are equal: mixing changes next to "
            "nothing, and a backdoor can only be in the rest."
        )
    if correlation < max(0.1, 5 * chance):
        return (
            f"the base is probably not the model's ancestor: over {len(correlations)} matrices the weights correlate "
            f"by {correlation:.3f} (median; unrelated weights by 0 with a standard deviation of {chance:.3f}), and "
            f"their distance is {distance:.2f} times their norm. Take the pre-trained model that it came from."
        )
    return None


def _sample(tensor: Tensor) -> Tensor:
    """Returns coordinates from the middle, flat, in float64: the first rows of a vocabulary are often not trained."""
    flat = tensor.detach().reshape(-1)
    start = max(len(flat) - SAMPLE, 0) // 2
    return flat[start : start + SAMPLE].double()
