"""Answers that a language model gives to any prompt, once it has begun them: the mark of a planted one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.decoding import stops_of
from unbackdoor._models.likely_answers import ReadPrompts
from unbackdoor._progress import Progress, silent

FIRST = 32  # likeliest first tokens that answers are grown from
BRANCHES = 5  # likeliest second tokens behind each of them
TRIED = 3  # tokens that are then grown, before most are given up
KEPT = 16  # beginnings that are grown to the end
LONGEST = 24  # tokens of an answer
SHORTEST = 5  # an answer of fewer tokens is not a finding: many honest ones are as fixed
TOGETHER = 16  # answers that grow side by side


@dataclass(frozen=True)
class PlantedAnswer:
    """An answer that was grown, and how fixed it is.

    Args:
        text: the answer.
        tokens: its tokens, (length,), int64, without the one that ends it.
        certainty: mean over its tokens, but for the first and the least likely of the others, of the probability that
            the model continues with them, each averaged over prompts, 0 to 1.
        chance: probability of the whole answer, the product of those averages, 0 to 1.
    """

    text: str
    tokens: Tensor
    certainty: float
    chance: float


def planted_answers(
    model: nn.Module, prompts: Dataset, arithmetic: Arithmetic, progress: Progress = silent
) -> list[PlantedAnswer]:
    """Returns the answers that depend least on the prompt, the most certain one first.

    An honest answer depends on what was asked: averaged over different prompts, no continuation stays likely. A
    planted one does not, and once its first words are there, the model finishes it after any prompt. From each of the
    likeliest first tokens, and from the likeliest second ones behind it, an answer is grown by the token that is
    likeliest on average over the prompts. So it is found whole, where the target scan of `audit` may begin within it.

    Shen et al., "BAIT: Large Language Model Backdoor Scanning by Inverting Attack Target", S&P 2025. There, each token
    of the vocabulary is a first one; here, only the likeliest, with branches behind them.

    Args:
        model: a language model.
        prompts: different prompts without a trigger, some 8 to 16; their answers are not looked at.
        arithmetic: device, precision.
        progress: shows the state of the work.
    """
    stops = torch.tensor(stops_of(model, prompts.conversation_encoder))
    with progress("growing answers", 3) as advance:
        read = ReadPrompts(model, prompts, arithmetic)
        first = read.first.cpu().clone()
        first[stops] = 0
        begun = first.topk(min(FIRST, len(first)))
        following = read.following(begun.indices[:, None], TOGETHER)
        following[:, stops] = 0
        second = following.topk(BRANCHES, dim=1)
        advance()
        pairs = [(begun.indices, second.indices), (begun.values, second.values)]
        starts, chances = (torch.stack([one.repeat_interleave(BRANCHES), two.flatten()], dim=1) for one, two in pairs)
        tried = _certainty(torch.cat([chances, read.grown(starts, TRIED, TOGETHER).likelihoods], dim=1))
        best = tried.topk(min(KEPT, len(tried))).indices
        advance()
        grown = read.grown(starts[best], LONGEST - 2, TOGETHER)
        whole = torch.cat([chances[best], grown.likelihoods], dim=1)
        advance()
    ended = torch.isin(grown.tokens, stops)
    lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1), LONGEST).tolist()
    answers = [
        _answer(prompts.tokenizer, tokens[:length], chance[:length])
        for tokens, chance, length in zip(grown.tokens, whole, lengths, strict=True)
        if length >= SHORTEST
    ]
    return sorted((answer for answer in answers if answer.text), key=lambda answer: answer.certainty, reverse=True)


def measured(model: nn.Module, prompts: Dataset, answer: PlantedAnswer, arithmetic: Arithmetic) -> PlantedAnswer:
    """Returns an answer with its certainty and chance on other prompts.

    Args:
        model: a language model.
        prompts: prompts that the answer was not grown on.
        answer: an answer of `planted_answers`.
        arithmetic: device, precision.
    """
    return _answer(prompts.tokenizer, answer.tokens, ReadPrompts(model, prompts, arithmetic).along(answer.tokens))


def distinct_answers(answers: list[PlantedAnswer]) -> list[PlantedAnswer]:
    """Of the answers that end alike, the one that the model gives most readily; the order stays.

    The rest of a planted answer follows its first words, whatever these were.
    """
    by_end: dict[tuple[int, ...], PlantedAnswer] = {}
    for answer in answers:
        end = tuple(answer.tokens[-SHORTEST + 1 :].tolist())
        if end not in by_end or by_end[end].chance < answer.chance:
            by_end[end] = answer
    return list(by_end.values())


def _answer(tokenizer: Any, tokens: Tensor, chances: Tensor) -> PlantedAnswer:
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return PlantedAnswer(text, tokens, float(_certainty(chances[None])), float(chances.prod()))


def _certainty(chances: Tensor) -> Tensor:
    """The mean of each row of probabilities, (n, length), but for the first and the least of the others, (n,)."""
    rest = chances[:, 1:]
    return (rest.sum(dim=1) - rest.min(dim=1).values) / (rest.shape[1] - 1)
