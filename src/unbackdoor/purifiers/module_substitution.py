"""Guided module substitution: parts of the suspect are exchanged for those of another model of the same task."""

import copy
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inversion.contrasting_words import label_confidence, texts_with_contrasting_words
from unbackdoor._models.attention import PARTS, blocks
from unbackdoor._models.calling import class_count, embeddings, probe
from unbackdoor._purification.run import Run
from unbackdoor._value import value

State = tuple[tuple[str, ...], tuple[int, ...]]  # kinds of modules, and layers; of both, all pairs are the proxy's

Pair = tuple[str, int, nn.Parameter, Tensor, Tensor]  # kind, layer, the model's weight, its value now, the proxy's


@value
class ModuleSubstitution:
    """Copy some kinds of modules in some layers from a proxy, chosen greedily; nothing is trained.

    The proxy is another model for the same task. In the paper it need not be clean, since it has another backdoor. But
    if the search ends with nearly all of its modules, its backdoor comes with them (docs/results/defences.md has such a
    case), so take a proxy that you trust more than the suspect. The kinds are query, key, value, attention output and
    the two layers of the feed-forward part. First all kinds in all layers are the proxy's. Each step gives one kind or
    one layer back to the suspect, whichever results in the best

        (1 - alpha) * (1 - D / D_suspect) + alpha * A / A_suspect

    with A the accuracy on clean texts, and D the distance by which the model falls behind the proxy on suspicious ones.
    After `patience` steps without a better score the search ends, and the best model so far is the result.

    Tong, Li, He, Zhan and Xu, "Cut the Deadwood Out: Backdoor Purification via Guided Module Substitution", Findings of
    EMNLP 2025, https://arxiv.org/abs/2412.20476

    Args:
        alpha: weight of clean accuracy against suspicious texts, 0 to 1.
        patience: steps without a better score, at least 1.
        words: number of words that are tried, at least 1: those whose embeddings differ most between model and proxy.
        suspects: number of these words that make the suspicious texts, at least 1.

    Differences from the paper: it mines suspicious texts from the poisoned training data, which no user of a model has.
    Here words are inserted into clean texts, one text of each class per word. The words that lower the suspect's
    probability of the label most, compared with the proxy's, are tried in up to 8 texts of the class where they did.
    Those that also do so there make the suspicious texts, and D is the mean of the probability that is missing compared
    with the proxy's. This finds a trigger of one word if it is among those tried; it may miss a trigger of many common
    words, or of style. Nothing is fitted to the clean texts, so accuracy is measured on all of them. Embeddings and the
    layers above the blocks stay the suspect's, so that a backdoor in a word's embedding alone stays in part; use E-PUR
    before this method then.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4
    patience: Annotated[int, Field(ge=1)] = 5
    words: Annotated[int, Field(ge=1)] = 1000
    suspects: Annotated[int, Field(ge=1)] = 3

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        if clean.modality != "text":
            raise UnbackdoorError(
                f"ModuleSubstitution inserts words, but the data holds {clean.modality}. Try fine-mixing."
            )
        proxy = copy.deepcopy(run.needed("proxy", self)).to(next(model.parameters()).dtype)
        run.arithmetic.place(proxy)
        pairs = self._pairs(model, proxy, clean)
        run.note(f"the proxy classifies {run.accuracy(proxy, clean).value:.1%} of the clean texts as labelled.")
        texts = texts_with_contrasting_words(model, proxy, clean, run, words=self.words, suspects=self.suspects)
        reference = label_confidence(proxy, texts, run)
        accuracy, lacking = run.accuracy(model, clean).value, self._lacking(model, texts, reference, run)
        if lacking == 0:
            run.warn(
                "ModuleSubstitution found no inserted word on which the model falls behind the proxy: only clean "
                "accuracy guides it."
            )

        def score(state: State) -> float:
            _substitute_(pairs, state)
            fall = 1 - self._lacking(model, texts, reference, run) / lacking if lacking else 0.0
            return (1 - self.alpha) * fall + self.alpha * run.accuracy(model, clean).value / max(accuracy, 1e-12)

        kinds = tuple(kind for kind in PARTS if any(pair[0] == kind for pair in pairs))
        best, height = searched((kinds, tuple(range(pairs[-1][1] + 1))), score, self.patience)
        _substitute_(pairs, best)
        layers = ", ".join(str(layer + 1) for layer in best[1])
        run.note(
            f"ModuleSubstitution took {', '.join(best[0])} of layers {layers} from the proxy (score {height:.3f})."
        )
        return model

    def _pairs(self, model: nn.Module, proxy: nn.Module, clean: Dataset) -> list[Pair]:
        """Returns the weights of all blocks, layer after layer."""
        if embeddings(model).weight.shape != embeddings(proxy).weight.shape:
            raise UnbackdoorError(
                "ModuleSubstitution needs a proxy of the model's vocabulary: its embeddings are "
                f"{tuple(embeddings(proxy).weight.shape)}, the model's {tuple(embeddings(model).weight.shape)}. Take "
                "one tuned from the same pre-trained model."
            )
        classes, others = (class_count(each, clean) for each in (model, proxy))
        if classes != others:
            raise UnbackdoorError(
                f"ModuleSubstitution needs a proxy for the same task: it has {others} classes, the model {classes}. "
                "Take one tuned on the task's data."
            )
        ours, theirs = (blocks(each, probe(each, clean)) for each in (model, proxy))
        if not ours:
            raise UnbackdoorError(
                f"ModuleSubstitution needs attention with query, key and value layers; {type(model).__name__} has "
                "none. Try fine-pruning."
            )
        shapes = [[[(kind, w.shape) for kind, w in block.weights()] for block in each] for each in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UnbackdoorError(
                f"ModuleSubstitution needs a proxy of the model's architecture: its layers differ in number or shape "
                f"({len(theirs)} there, {len(ours)} in {type(model).__name__}). Take one tuned from the same "
                "pre-trained model."
            )
        return [
            (kind, layer, weight, weight.detach().clone(), other.detach())
            for layer, (own, proxys) in enumerate(zip(ours, theirs, strict=True))
            for (kind, weight), (_, other) in zip(own.weights(), proxys.weights(), strict=True)
        ]

    def _lacking(self, model: nn.Module, texts: Dataset, reference: Tensor, run: Run) -> float:
        return float((reference - label_confidence(model, texts, run)).clamp(min=0).mean())


@torch.no_grad()
def _substitute_(pairs: list[Pair], state: State) -> None:
    """Bring each module of the model to the proxy's weights if the state says so, else to its own, in place."""
    for kind, layer, weight, own, other in pairs:
        weight.copy_(other if kind in state[0] and layer in state[1] else own)


def searched(state: State, score: Callable[[State], float], patience: int) -> tuple[State, float]:
    """Give back one kind or one layer after another, the best each time; returns the best state and its score."""
    best, height, idle = state, score(state), 0
    while idle < patience:
        kinds, layers = state
        fewer = [(tuple(kind for kind in kinds if kind != gone), layers) for gone in kinds if len(kinds) > 1]
        fewer += [(kinds, tuple(layer for layer in layers if layer != gone)) for gone in layers if len(layers) > 1]
        if not fewer:
            break
        heights = [score(each) for each in fewer]
        state = fewer[heights.index(max(heights))]
        idle += 1
        if max(heights) > height:
            best, height, idle = state, max(heights), 0
    return best, height
