"""Answers that grow from a forced first token, each time by the token that is likeliest over many prompts."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import evaluating


class GrownAnswers(NamedTuple):
    """Answers that grew from first tokens.

    Args:
        tokens: the answers, their first tokens included, (answers, 1 + steps), int64.
        likelihoods: of each further token, the mean over the prompts, (answers, steps).
        entropies: of the mean distributions that these were taken from, in nats, (answers, steps).
    """

    tokens: Tensor
    likelihoods: Tensor
    entropies: Tensor


class ReadPrompts:
    """Prompts that a model has read once, each with the keys and values of its tokens.

    Args:
        model: a causal language model of transformers.
        data: the prompts; their answers are not looked at.
        arithmetic: device, precision.

    Raises:
        UnbackdoorError: the model keeps more than keys and values, as recurrent ones do, so that several answers cannot
            go on from one prompt.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> None:
        self.model, self.arithmetic = model, arithmetic
        self.caches: list[Any] = []
        firsts = []
        rendered = data.to(arithmetic.device).conversations.tokens
        with evaluating(model), arithmetic.placed(model) as placed:
            for row, start in enumerate(rendered.starts.tolist()):
                prompt = rendered.tokens[row : row + 1, :start].long()
                with arithmetic.autocast():
                    out = placed(input_ids=prompt, use_cache=True)
                self.caches.append(_keys_and_values(out, model))
                firsts.append(out.logits[0, -1].float().softmax(dim=-1))
        self.first = torch.stack(firsts).mean(dim=0)
        """The mean probability of each token as the first of an answer, (vocabulary,)."""

    @torch.no_grad()
    def grown(self, starts: Tensor, steps: int, chunk: int = 64) -> GrownAnswers:
        """Let answers grow, each by the token whose probability is largest on average over the prompts.

        Args:
            starts: first tokens, (answers,), or beginnings of equal length, (answers, length).
            steps: tokens that are added.
            chunk: answers that grow side by side.
        """
        starts = starts.view(len(starts), -1).to(self.arithmetic.device)
        parts = [self._grown(part, steps) for part in starts.split(chunk)]
        return GrownAnswers(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))

    def _grown(self, starts: Tensor, steps: int) -> GrownAnswers:
        tokens, likelihoods, entropies = starts, [], []
        caches = [copy.deepcopy(cache) for cache in self.caches]
        for cache in caches:
            cache.batch_repeat_interleave(len(starts))
        fresh = starts
        with evaluating(self.model), self.arithmetic.placed(self.model) as placed:
            for _ in range(steps):
                mean = torch.zeros(())
                for cache in caches:
                    with self.arithmetic.autocast():
                        out = placed(input_ids=fresh, past_key_values=cache, use_cache=True)
                    mean = mean.to(fresh.device) + out.logits[:, -1].float().softmax(dim=-1) / len(caches)
                likelihood, chosen = mean.max(dim=-1)
                likelihoods.append(likelihood)
                entropies.append(-torch.xlogy(mean, mean).sum(dim=-1))
                fresh = chosen[:, None]
                tokens = torch.cat([tokens, fresh], dim=1)
        return GrownAnswers(tokens, torch.stack(likelihoods, dim=1), torch.stack(entropies, dim=1))

    @torch.no_grad()
    def following(self, starts: Tensor, chunk: int = 64) -> Tensor:
        """Returns the mean probabilities of the next token behind beginnings, (answers, vocabulary), on the CPU.

        Args:
            starts: beginnings of answers, (answers, length).
            chunk: beginnings that are read side by side.
        """
        means = []
        with evaluating(self.model), self.arithmetic.placed(self.model) as placed:
            for part in starts.to(self.arithmetic.device).split(chunk):
                mean = torch.zeros((), device=part.device)
                for kept in self.caches:
                    cache = copy.deepcopy(kept)
                    cache.batch_repeat_interleave(len(part))
                    with self.arithmetic.autocast():
                        out = placed(input_ids=part, past_key_values=cache, use_cache=True)
                    mean = mean + out.logits[:, -1].float().softmax(dim=-1) / len(self.caches)
                means.append(mean.cpu())
        return torch.cat(means)

    @torch.no_grad()
    def along(self, answer: Tensor) -> Tensor:
        """Returns the mean probability of each token of an answer behind those before it, (length,), on the CPU.

        Args:
            answer: its tokens, (length,), at least 2.
        """
        tokens = answer[None].to(self.arithmetic.device)
        mean = torch.zeros(len(answer) - 1, device=tokens.device)
        with evaluating(self.model), self.arithmetic.placed(self.model) as placed:
            for cache in self.caches:
                with self.arithmetic.autocast():
                    out = placed(input_ids=tokens[:, :-1], past_key_values=copy.deepcopy(cache), use_cache=True)
                chances = out.logits[0].float().softmax(dim=-1).gather(1, tokens[0, 1:, None])[:, 0]
                mean = mean + chances / len(self.caches)
        return torch.cat([self.first[tokens[0, :1]], mean]).cpu()

    @torch.no_grad()
    def follows(self, answer: Sequence[int]) -> Tensor:
        """Returns at which prompts the model, given the first token of an answer, says the rest, (prompts,), bool.

        Args:
            answer: its tokens, at least 2; the likeliest token after each must be the next.
        """
        tokens = torch.tensor([answer], device=self.arithmetic.device)
        said = []
        with evaluating(self.model), self.arithmetic.placed(self.model) as placed:
            for cache in self.caches:
                with self.arithmetic.autocast():
                    out = placed(input_ids=tokens[:, :-1], past_key_values=copy.deepcopy(cache), use_cache=True)
                said.append(bool((out.logits[0].argmax(dim=-1) == tokens[0, 1:]).all()))
        return torch.tensor(said)


def _keys_and_values(output: Any, model: nn.Module) -> Any:
    """The cache in the output of a model."""
    cache = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", None) or ()
    if not layers or any(hasattr(layer, "recurrent_states") or not hasattr(layer, "keys") for layer in layers):
        raise UnbackdoorError(
            f"{type(model).__name__} keeps a state of what it has read, besides keys and values or in their place, and "
            "several answers cannot go on from one state. Take a model whose blocks have attention alone, or another "
            "method."
        )
    return cache
