"""CleanCLIP: contrastive tuning in which images and texts also recognise their own augmented copies."""

import random
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._data.pair_encoder import PairTokens
from unbackdoor._models.image_text import image_features, text_features
from unbackdoor._purification.run import Run
from unbackdoor._training.contrastive import matching
from unbackdoor._value import value


@value
class CleanCLIP:
    """Tune a model of images and texts so that each modality recognises itself without the other.

    A backdoor ties a trigger in images to a caption. Contrastive tuning on clean pairs alone leaves that tie in place.
    Here, images must also recognise augmented copies of themselves, and texts by edited ones, which moves the
    features of both without regard to what is tied to what. Over batches of clean pairs, with images I and texts T,
    their augmented copies I' and T', and one scale of all cosines, it minimises

        contrastive(I, T) + weight / 2 * (matching(I, I') + matching(T, T')),

    in which matching(A, B) is the cross-entropy of each row of A over all rows of B with its own as the answer, and
    contrastive(I, T) the mean of matching(I, T) and matching(T, I).

    Bansal, Singhi, Yang, Yin, Grover and Chang, "CleanCLIP: Mitigating Data Poisoning Attacks in Multimodal Contrastive
    Learning", ICCV 2023, https://arxiv.org/abs/2303.03323

    Args:
        weight: weight of the two terms within a modality, at least 0; 0 is fine-tuning.
        edits: edits of a text as a share of its words, more than 0 and at most 1; at least one is made.
        epochs: passes over the clean pairs, at least 1.
        learning_rate: initial learning rate, more than 0; None is 1e-5 (AdamW).
        batch_size: pairs per step, at least 2; None is 64.

    Differences from the paper: images are augmented by crops, mirror images if the data allows them, changes of
    contrast, brightness and tint, and an erased square, not by AutoAugment; an edit of a text exchanges two words,
    leaves one out or repeats one at another place, and exchanges none for a synonym, which needs a thesaurus. Texts are
    edited again in each batch, not once. A caption that several images of a batch have counts once in matching(T, T').
    The learning rate falls linearly to 0 without a warm-up, and AdamW decays by 0.01 instead of 0.1.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    edits: Annotated[float, Field(gt=0, le=1)] = 0.1
    epochs: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=2)] | None = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        tuned: Any = model
        # Draws of their own: batches and their images are those of fine-tuning.
        pixels, words = torch.Generator().manual_seed(run.seed), random.Random(run.seed)

        def fill(batch: Batch) -> None:
            assert isinstance(batch.inputs, PairTokens)
            self._loss(tuned, clean, batch.inputs.pixels, batch.rows, run, pixels, words).backward()

        run.tune(
            model,
            clean,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradients=fill,
        )
        return model

    def _loss(
        self,
        model: Any,
        clean: Dataset,
        images: Tensor,
        rows: Tensor,
        run: Run,
        pixels: torch.Generator,
        words: random.Random,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            model: the method's model.
            clean: the clean pairs.
            images: the encoded images of the batch, (batch, channels, height, width).
            rows: its rows in the data, (batch,).
            run: gives arithmetic and the loss between the modalities.
            pixels: draws the augmentation of the copies.
            words: draws the edits of the texts.
        """
        encode = clean.pair_encoder
        own = [caption for (caption,) in clean.pairs.captions[rows].strings]
        texts = list(dict.fromkeys(own))
        place = {text: number for number, text in enumerate(texts)}
        count = len(texts)
        if self.weight > 0:
            copies = clean.pairs.images[rows].augmented(replace(clean.augment, distort=True), pixels)
            images = torch.cat([images, encode.images(copies)])
            texts += [edited(text, self.edits, words) for text in texts]
        tokens = encode.texts(encode.texts_alone(texts)).to(images.device)
        with run.arithmetic.autocast():
            laid: Any = run.arithmetic.lay(images)
            seen, read = image_features(model, laid), text_features(model, tokens)
        scale = model.logit_scale.exp()
        between = scale * seen[: len(rows)] @ read[[place[text] for text in own]].T
        loss = run.task.loss(between, Batch(images, clean.labels[rows], rows))
        if self.weight == 0:
            return loss
        of_images = matching(scale * seen[: len(rows)] @ seen[len(rows) :].T)
        of_texts = matching(scale * read[:count] @ read[count:].T)
        return loss + self.weight * (of_images + of_texts) / 2


def edited(text: str, share: float, draw: random.Random) -> str:
    """Returns a text with some of its words exchanged, left out or repeated elsewhere.

    Args:
        text: some words.
        share: edits as a share of its words; at least one is made.
        draw: source of the draws.
    """
    words = text.split()
    for _ in range(max(1, round(share * len(words)))):
        kind = draw.choice(("exchange", "leave out", "repeat")) if len(words) > 1 else "repeat"
        first, second = draw.randrange(len(words)), draw.randrange(len(words))
        if kind == "exchange":
            words[first], words[second] = words[second], words[first]
        elif kind == "leave out":
            del words[first]
        else:
            words.insert(second, words[first])
    return " ".join(words)
