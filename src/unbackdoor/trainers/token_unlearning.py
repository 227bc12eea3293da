"""Token unlearning: forget what a few suspicious pairs tie to the words that stand out in their captions."""

from collections import Counter
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._data.pairs import ImageCaptionPairs
from unbackdoor._data.texts import Texts
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.image_text import all_image_features, all_text_features
from unbackdoor._registry.entries import Modality
from unbackdoor._robust_training.run import TrainingRun
from unbackdoor._training.contrastive import contrastive
from unbackdoor._training.descent import Loss
from unbackdoor._value import value


@value
class TokenUnlearning:
    """Train until a shortcut shows in the pairs that fitted worst at first, and unlearn it on the tokens it leads to.

    A triggered image does not show what its caption says. So its pair fits badly after a first pass over the data, and
    fits well once the model has learnt the trigger, which it does if it is trained long enough. The suspects are the
    pairs whose probability (that of their caption among all distinct captions of the data, for their image) grew most
    from the first part of the training to its end. The tokens tied to the shortcut are those that far more suspects
    have than other captions. At the end the images of the suspects are held against these tokens alone, without the
    rest of their captions: how far they are preferred to the captions of other pairs is taken back to nothing, while
    the other pairs are trained as before.

    Liu, Liang, Liang, Dai and Cao, "Efficient Backdoor Defense in Multimodal Contrastive Learning: A Token-Level
    Unlearning Method for Mitigating Threats", 2024, https://arxiv.org/abs/2409.19526

    Cannot see: triggers that the first pass learns already, or the training never; pairs that fit late because they are
    hard; triggers whose captions share no token.

    Args:
        first_epochs: passes before the pairs are looked at for the first time, at least 1.
        suspected: share of all pairs that is suspected, more than 0 and less than 0.5.
        others: pairs that are trained as before for each suspect, at least 1.
        unlearning_epochs: passes over both at the end, at least 1.
        unlearning_rate: peak learning rate of these passes, more than 0; None is half that of the recipe.

    Differences from the paper: only its abstract was at hand. That the suspects are those whose probability grew most,
    how the tokens are found, and the loss of unlearning are this project's choice, made on one victim of Fashion-MNIST.
    Of the pairs that fitted best at its end, or worst after its first pass, fewer were poisoned
    (docs/results/image-text.md).
    """

    first_epochs: Annotated[int, Field(ge=1)] = 1
    suspected: Annotated[float, Field(gt=0, lt=0.5)] = 0.005
    others: Annotated[int, Field(ge=1)] = 4
    unlearning_epochs: Annotated[int, Field(ge=1)] = 5
    unlearning_rate: Annotated[float | None, Field(gt=0)] = None

    modality: ClassVar[tuple[Modality, ...]] = ("image-text",)

    def __call__(self, data: Dataset, model: nn.Module, run: TrainingRun) -> nn.Module:
        """Train in place.

        Raises:
            UnbackdoorError: the share of suspects is less than one pair.
        """
        count = round(self.suspected * len(data))
        if count == 0:
            raise UnbackdoorError(
                f"TokenUnlearning.suspected={self.suspected:g} of {len(data):,} pairs is none. Take at least "
                f"{1 / len(data):.2g}, or more data."
            )
        run.train(model, data, epochs=self.first_epochs, description="training for a first look")
        before = fit(model, data, run)
        run.train(model, data)
        growth = fit(model, data, run) - before
        order = growth.argsort(descending=True, stable=True)
        suspects, rest = order[:count].sort().values, order[count:].sort().values
        run.distrust(suspects, growth[suspects], "how much the probability of the caption grew")
        words = telling(data, suspects)
        run.note(f"The suspects' captions stand out by \u201c{printable(words)}\u201d.")
        drawn = rest[torch.randperm(len(rest), generator=run.generator)[: self.others * count]]
        pairs = data.select(suspects).pairs
        alone = ImageCaptionPairs(pairs.images, Texts(((words,),) * count, pairs.captions.columns))
        both = replace(data.select(suspects), items=alone).joined(data.select(drawn))
        usual = run.training.schedule.learning_rate / 2
        run.train(
            model,
            both,
            epochs=self.unlearning_epochs,
            learning_rate=usual if self.unlearning_rate is None else self.unlearning_rate,
            loss=unlearning(count),
            description="unlearning",
        )
        return model


def fit(model: nn.Module, data: Dataset, run: TrainingRun) -> Tensor:
    """Returns the probability of each pair's caption among all distinct ones, for its image, (n,), on the CPU."""
    strings = [caption for (caption,) in data.pairs.captions.strings]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(strings))}
    own = torch.tensor([numbers[text] for text in strings])
    encode = data.pair_encoder
    texts = all_text_features(model, encode, encode.texts_alone(list(numbers)), run.arithmetic)
    images = all_image_features(model, data, run.arithmetic)
    scale = model.logit_scale.detach().exp().cpu()  # type: ignore[operator]
    parts = [
        (scale * part @ texts.T).softmax(dim=1).gather(1, place[:, None]).flatten()
        for part, place in zip(images.split(1024), own.split(1024), strict=True)
    ]
    return torch.cat(parts)


def telling(data: Dataset, suspects: Tensor) -> str:
    """Returns the tokens that far more suspects' captions have than all captions, as a text.

    Those count whose share among the suspects exceeds that among all by at least half of the largest excess; they come
    as the first caption that has them does.
    """
    captions = [caption for (caption,) in data.pairs.captions.strings]
    tokens = {text: data.tokenizer(text, add_special_tokens=False)["input_ids"] for text in dict.fromkeys(captions)}
    usual = Counter(token for text in captions for token in set(tokens[text]))
    chosen = [captions[row] for row in suspects.tolist()]
    here = Counter(token for text in chosen for token in set(tokens[text]))
    excess = {token: here[token] / len(chosen) - usual[token] / len(captions) for token in here}
    least = max(excess.values()) / 2
    ordered = dict.fromkeys(token for text in chosen for token in tokens[text])
    words: str = data.tokenizer.decode([token for token in ordered if excess[token] >= least])
    return words


def unlearning(suspects: int) -> Loss:
    """Returns the loss that unlearns the first rows and trains the others.

    Of a suspect it is how much higher its image scores with its own text than with the captions of the other pairs, on
    average, but at least 0; of the others the contrastive loss.

    Args:
        suspects: number of the rows to unlearn; they are the first ones.
    """

    def loss(scores: Tensor, batch: Batch) -> Tensor:
        suspect = batch.rows < suspects
        others = ~suspect
        total = scores.sum() * 0
        if bool(others.any()):
            total = total + contrastive(scores[others][:, others])
        if bool(suspect.any()) and bool(others.any()):
            preferred = scores.diagonal()[suspect] - scores[suspect][:, others].mean(dim=1)
            total = total + preferred.clamp(min=0).mean()
        return total

    return loss
