"""Words whose embeddings moved far from the pre-trained ones for how rare they are."""

import math
from typing import Any

import torch


def suspicious_tokens(moved: torch.Tensor, tokenizer: Any, counts: dict[int, float], floor: int) -> list[int]:
    """Returns token ids, the most suspicious first, without special and unused tokens.

    The score of a token is the distance that its embedding moved over the logarithm of its count; `EPUR` explains it.

    Args:
        moved: change of the embeddings, (tokens, width).
        tokenizer: a tokenizer of transformers.
        counts: counts by token id; absent tokens have 0.
        floor: smaller counts are raised to this, at least 2.
    """
    distance = moved.float().norm(dim=1).tolist()
    special = set(tokenizer.all_special_ids)
    scored = []
    for token, number in tokenizer.get_vocab().items():
        if number in special or number >= len(distance) or token.startswith(("[unused", "<unused", "madeupword")):
            continue
        scored.append((distance[number] / math.log(max(counts.get(number, 0.0), floor)), number))
    return [number for score, number in sorted(scored, key=lambda entry: (-entry[0], entry[1])) if score > 0]


def moved_for_its_count(distance: torch.Tensor, counts: torch.Tensor, floor: int) -> torch.Tensor:
    """The same score for all rows at once, (n,), float64.

    >>> moved_for_its_count(torch.tensor([3.0, 3.0]), torch.tensor([math.e**3, 0.0]), 20)
    tensor([1.0000, 1.0014], dtype=torch.float64)

    Args:
        distance: that each row moved, (n,).
        counts: of the rows' tokens, (n,).
        floor: smaller counts are raised to this, at least 2.
    """
    return distance.double() / counts.double().clamp(min=floor).log()
