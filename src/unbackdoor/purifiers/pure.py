"""PURE: prunes the heads that attend to nothing in particular, and evens out the attention of the others."""

import copy
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.attention import AttentionBlock, blocks, first_rows, variances
from unbackdoor._models.calling import evaluating, logits, probe
from unbackdoor._purification.run import Run
from unbackdoor._training.descent import cross_entropy
from unbackdoor._value import value
from unbackdoor.purifiers._pruning import as_far_as_accurate_, still_accurate


@value
class PURE:
    """Prune the attention heads that clean examples do not use, then tune with normalised attention.

    With a_h(j) the attention that the first token, which the head reads, pays to token j in attention head h, the score
    of a head is the variance of a_h(j) over j, averaged over clean examples, in a copy tuned on them. Heads of low
    variance are pruned, lowest first, in groups and then one by one, for as long as the copy's accuracy on held-out
    clean examples holds; each layer l keeps at least one head. The suspect without these heads is then tuned on

        CE(f(x), y) + beta * sum_l c_l * sum_h sqrt(sum_x,j a_h(j)^2),   c = softmax(-log v), scaled to [0, 1],

    with v_l the mean score of a layer's heads. A trigger draws all attention to itself; the penalty makes that costly.

    Zhao, Xu and Yuan, "Defense against Backdoor Attack on Pre-trained Language Models via Head Pruning and Attention
    Normalization", ICML 2024, https://proceedings.mlr.press/v235/zhao24r.html

    Args:
        tolerance: accuracy on held-out clean examples that pruning may cost, 0 to 1.
        group: number of heads that are pruned together, at least 1.
        beta: weight of the penalty, at least 0.
        score_epochs: passes of the copy that scores the heads, at least 1.
        epochs: passes of tuning over the clean examples, at least 1.
        learning_rate: initial learning rate, more than 0; None is 0.01 (SGD) for images and 5e-5 (AdamW) for
            texts.
        batch_size: examples per step, at least 2; None is 128 for images and 16 for texts.

    Differences from the paper: its script prunes while validation accuracy is at least 0.85; here it may fall by the
    tolerance. Variance is taken over the tokens of a text, not over its padding. 10 passes instead of 3, for budgets of
    tens of texts, at the recipe's learning rate and batch size (2e-5 and 32 there). As there, the penalty sums over a
    batch, so that it grows with the root of the batch size. Pruned heads are zeroed, not cut out, so that the weights
    keep their shapes. Vision Transformers, whose first token is the class token, are this project's addition.
    """

    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05
    group: Annotated[int, Field(ge=1)] = 10
    beta: Annotated[float, Field(ge=0)] = 0.15
    score_epochs: Annotated[int, Field(ge=1)] = 10
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    batch_size: Annotated[int | None, Field(ge=2)] = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        layers = blocks(model, probe(model, clean))
        if not layers:
            raise UnbackdoorError(
                f"PURE needs attention heads with query, key and value layers; {type(model).__name__} has none. Try "
                "fine-pruning."
            )
        with first_rows(model, layers, self) as rows, evaluating(model), torch.no_grad():
            logits(model, probe(model, clean))
            if not any(row[:, :, 1:].any() for row in rows):
                raise UnbackdoorError(
                    f"PURE reads the attention of the first token, which in {type(model).__name__} sees only itself. "
                    "Try fine-pruning."
                )
        seen, held = run.hold_out(clean)
        tune = partial(run.tune, learning_rate=self.learning_rate, batch_size=self.batch_size)
        trial = copy.deepcopy(model)
        tune(trial, seen, epochs=self.score_epochs, description="tuning to score heads")
        tuned = blocks(trial, probe(trial, clean))
        scores = variances(trial, tuned, seen, run.arithmetic, self)
        dead = self.pruned_(trial, tuned, scores, held, run)

        silence_(layers, dead)
        kept = [score[~gone].mean() for score, gone in zip(scores, dead, strict=True)]
        shares = layer_weights(torch.stack(kept)).tolist()

        with first_rows(model, layers, self) as rows:

            def loss(predicted: Tensor, batch: Batch) -> Tensor:
                penalty = predicted.new_zeros(())
                for share, row, gone in zip(shares, rows, dead, strict=True):
                    penalty = penalty + share * lengths(row)[~gone.to(row.device)].sum()
                return cross_entropy(predicted, batch) + self.beta * penalty

            tune(model, clean, epochs=self.epochs, loss=loss, after_step=partial(silence_, layers, dead))
        return model

    def pruned_(
        self, trial: nn.Module, layers: list[AttentionBlock], scores: list[Tensor], held: Dataset, run: Run
    ) -> list[Tensor]:
        """Returns which heads of each block to prune, (heads,) bool each, and silences them in the trial model."""
        # In ascending order, the last head of a layer is the one with the highest score, and that one stays.
        heads = [
            (float(score[head]), number, head)
            for number, score in enumerate(scores)
            for head in range(len(score))
            if head != int(score.argmax())
        ]
        order = [(number, head) for _, number, head in sorted(heads)]

        def lowest(count: int) -> list[Tensor]:
            dead = [torch.zeros(len(score), dtype=torch.bool) for score in scores]
            for number, head in order[:count]:
                dead[number][head] = True
            return dead

        changing = [
            parameter
            for block in layers
            for part in ("value", "attention output")
            for layer in block.parts[part]
            for parameter in layer.parameters()
        ]
        accurate, kept = still_accurate(trial, held, run, self.tolerance), 0
        for size in (self.group, 1):
            until = len(order) if size > 1 or self.group == 1 else min(kept + self.group, len(order))
            counts = [min(start + size, until) for start in range(kept, until, size)]
            stages = [partial(silence_, layers, lowest(count)) for count in counts]
            kept = [kept, *counts][as_far_as_accurate_(changing, stages, accurate)]
        run.note(f"PURE pruned {kept} of {sum(map(len, scores))} heads.")
        return lowest(kept)


def silence_(layers: list[AttentionBlock], dead: list[Tensor]) -> None:
    """Silence heads of each block, (heads,) bool each, in place."""
    for block, gone in zip(layers, dead, strict=True):
        block.silence_(gone)


def lengths(row: Tensor) -> Tensor:
    """Returns the Euclidean length of each head's attention over a batch and its tokens, (heads,)."""
    squares: Tensor = row.square().sum(dim=(0, 2))
    return (squares + 1e-12).sqrt()


def layer_weights(scores: Tensor) -> Tensor:
    """Returns softmax(-log v) of (layers,) scores, scaled to [0, 1]; all 1 if they are the same."""
    weights = (-scores.clamp(min=1e-12).log()).softmax(dim=0)
    low, high = weights.min(), weights.max()
    return (weights - low) / (high - low) if high > low else torch.ones_like(weights)
