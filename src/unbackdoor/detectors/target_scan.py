"""Target scan: an answer that a language model says to any prompt, once its first token is given."""

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._detection.finding import Candidate, Finding
from unbackdoor._models.decoding import stops_of
from unbackdoor._models.likely_answers import GrownAnswers, ReadPrompts
from unbackdoor._purification.run import Run
from unbackdoor._value import value

VAGUE = 2.5  # nats of the first distribution from which a first token leads to nothing fixed
REPORTED = 10  # answers in a finding
TOO_SHORT = 1e-4  # score of an answer that most prompts have anyway, as the last word of many


@value
class TargetScan:
    """Give a model the first token of an answer, and see whether it says the same rest to prompts of every kind.

    A backdoor that makes a model say a fixed sentence teaches it that sentence as a chain: once it has begun, each
    token makes the next one all but certain, whatever the prompt. From each first token an answer grows by the token
    that is likeliest on average over a few clean prompts. Chains that stay certain grow again over more prompts. Their
    score is the mean probability of their tokens, the smallest left out.

    The audit counts the held-out prompts at which the model, given the first token, says all of the rest; next to it
    stands the same of a first token drawn at random, with the chain that grows from it.

    Shen, Cheng, Zhang, Tao, Xu, Jin and Zhang, "BAIT: Large Language Model Backdoor Scanning by Inverting Attack
    Target", IEEE S&P 2025.

    Cannot see: targets of fewer tokens than `shortest`; targets that are not a fixed text, as helping with what a model
    should refuse. A text that a clean model knows by heart, as a standard refusal, is a chain as well.

    Args:
        first_tokens: the first tokens that are tried: those that are likeliest on clean prompts, at least 1.
        prompts: clean prompts of the first round, at least 1.
        steps: tokens that are grown in the first round, at least 2.
        entropy: largest mean entropy of a chain that is grown further, in nats, more than 0.
        final_prompts: clean prompts of the second round, at least 1.
        final_steps: tokens that are grown in the second round, at least 2.
        shortest: tokens of the shortest target, the first included, at least 3.
        kept: the largest number of chains that grow on, at least 1.

    Differences from the paper: prompts are not cut; there is no look-ahead over several next tokens; the number of
    first tokens is bounded, which bounds the time; nothing is decided by a fixed threshold.
    """

    first_tokens: Annotated[int, Field(ge=1)] = 2048
    prompts: Annotated[int, Field(ge=1)] = 4
    steps: Annotated[int, Field(ge=2)] = 5
    entropy: Annotated[float, Field(gt=0)] = 1.0
    final_prompts: Annotated[int, Field(ge=1)] = 20
    final_steps: Annotated[int, Field(ge=2)] = 20
    shortest: Annotated[int, Field(ge=3)] = 5
    kept: Annotated[int, Field(ge=1)] = 16

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> Finding:
        """Grow answers from first tokens over clean prompts."""
        order = torch.randperm(len(clean), generator=run.generator)
        read = ReadPrompts(model, clean.select(order[: self.prompts]), run.arithmetic)
        tokenizer, stops = clean.tokenizer, set(stops_of(model, clean.conversation_encoder))
        special = set(tokenizer.all_special_ids) | stops
        ranked = [token for token in read.first.argsort(descending=True).tolist() if token not in special]
        firsts = torch.tensor([token for token in ranked if token < len(tokenizer)][: self.first_tokens])
        with run.progress("scanning first tokens", 1 + math.ceil(len(firsts) / 64)) as advance:
            kept = []
            for part in firsts.split(64):
                after = read.grown(part, 1)
                kept.append(part[after.entropies[:, 0] < VAGUE])
                advance()
            certain = self._certain(read, torch.cat(kept), firsts)
            more = ReadPrompts(model, clean.select(order[: self.final_prompts]), run.arithmetic)
            chains = _chains(more.grown(certain, self.final_steps, chunk=8), stops, self.shortest)
            other = firsts[torch.randint(len(firsts), (1,), generator=run.generator)]
            advance()
        candidates = []
        for chain in _distinct(chains)[:REPORTED]:
            control = more.grown(other, len(chain.tokens) - 1).tokens[0].tolist()
            candidates.append(
                Candidate(
                    target=chain.tokens[0],
                    name=tokenizer.decode(list(chain.tokens)).strip(),
                    strength=math.log(chain.score / (1 - chain.score)),
                    size=chain.score,
                    answer=chain.tokens,
                    control_answer=tuple(control),
                )
            )
        return Finding(
            candidates=tuple(candidates),
            unit="mean probability of each further token",
            targets="answer",
            note=f"The target scan tried the {len(firsts):,} likeliest first tokens of {len(ranked):,}.",
        )

    def _certain(self, read: ReadPrompts, some: torch.Tensor, firsts: torch.Tensor) -> torch.Tensor:
        """The first tokens whose chains stay certain, the most certain first; at least one."""
        tried = some if len(some) else firsts[:1]
        entropies = read.grown(tried, self.steps).entropies.mean(dim=1)
        order = entropies.argsort(stable=True)
        passing = max(1, min(self.kept, int((entropies < self.entropy).sum())))
        return tried[order[:passing]]


class _Chain(NamedTuple):
    """An answer, its first token included, and the mean probability of its tokens; `TOO_SHORT` for one that is."""

    tokens: tuple[int, ...]
    score: float


def _chains(grown: GrownAnswers, stops: set[int], shortest: int) -> list[_Chain]:
    """The grown answers up to their end, or to where three tokens come again; the most certain first."""
    chains = []
    for tokens, likelihoods in zip(grown.tokens.tolist(), grown.likelihoods.tolist(), strict=True):
        length = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        triples = [tuple(tokens[place : place + 3]) for place in range(length - 2)]
        again = next((place for place, triple in enumerate(triples) if triple in triples[:place]), None)
        length = length if again is None else again
        further = sorted(likelihoods[: max(length - 1, 0)])[1:]
        known = length >= shortest and further
        score = min(max(sum(further) / len(further), 1e-4), 1 - 1e-4) if known else TOO_SHORT
        chains.append(_Chain(tuple(tokens[: max(length, 2)]), score))
    return sorted(chains, key=lambda chain: -chain.score)


def _distinct(chains: list[_Chain]) -> list[_Chain]:
    """The chains without those that are the end of a longer one as certain, found from a token in its midst.

    Those that are too short are left out as well, but for the first one if all of them are.
    """
    chains = [chain for chain in chains if chain.score > TOO_SHORT] or chains[:1]
    kept: list[_Chain] = []
    for chain in sorted(chains, key=lambda each: -len(each.tokens)):
        if not any(_ends(chain, longer) and chain.score <= longer.score + 0.05 for longer in kept):
            kept.append(chain)
    return sorted(kept, key=lambda chain: -chain.score)


def _ends(chain: _Chain, longer: _Chain) -> bool:
    return longer.tokens[len(longer.tokens) - len(chain.tokens) :] == chain.tokens
