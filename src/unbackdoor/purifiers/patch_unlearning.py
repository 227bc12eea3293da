"""Patch unlearning: the patches that bring different images together are found, and lose their effect."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._data.pair_encoder import PairTokens
from unbackdoor._inversion.encoder_patches import FAMILY, encoder_patches, pictures_of
from unbackdoor._models.image_text import all_image_features, image_features
from unbackdoor._purification.run import Run
from unbackdoor._value import value


@value
class PatchUnlearning:
    """Find the smallest patches that bring the embeddings of different images together, and tune them away.

    A trigger in images brings the embedding e of every image x to the place that the attacker chose. The search of the
    detector `encoder-patch` finds patches that do so, from many starts: in a backdoored encoder one of them is the
    trigger or close to it, the others are patches that work on clean encoders as well. All are unlearnt alike, so
    nothing has to be decided. With the suspect's embeddings s(x) as the answers, over batches of clean images, each
    batch with one patch drawn at random (x'), it minimises

        mean of 2 - cos(e(x), s(x)) - cos(e(x'), s(x)).

    Then the search starts again on the tuned model, since a patch that was found is not the whole trigger. Neither
    captions nor labels are read, and the text tower stays as it is.

    This project's own; the search is that of Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023,
    https://arxiv.org/abs/2303.15180

    Cannot remove: triggers over the whole picture, unless a patch has the same effect; backdoors of the text encoder.

    Args:
        rounds: searches with a tuning after each, at least 1.
        starts: patches that each search starts from, at least 1.
        steps: steps of each search, at least 1.
        epochs: passes over the clean images in each round, at least 1.
        learning_rate: initial learning rate, more than 0; None is 1e-5 (AdamW).
        batch_size: images per step, at least 1; None is 64.

    Differences from the paper: there is no paper on this method.
    """

    # The first version unlearnt the smallest patch of each class alone, and so needed labels.
    version: ClassVar[int] = 2

    rounds: Annotated[int, Field(ge=1)] = 2
    starts: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int, Field(ge=1)] = 200
    epochs: Annotated[int, Field(ge=1)] = 20
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
        """Purify in place."""
        answers = all_image_features(model, clean, run.arithmetic).to(run.arithmetic.device)
        pictures, encode = pictures_of(clean), clean.pair_encoder.images
        for number in range(1, self.rounds + 1):
            patches = encoder_patches(model, clean, run, self, starts=self.starts, steps=self.steps).parameters
            sizes = ", ".join(
                f"{share:.1%}" for share in sorted((FAMILY.size(patches) / math.prod(clean.shape[1:])).tolist())
            )
            run.note(f"round {number}: patches of {sizes} of the picture bring images together; they are unlearnt.")

            def fill(batch: Batch, patches: Tensor = patches) -> None:
                drawn = int(torch.randint(len(patches), (), generator=run.generator))
                pixels = pictures.inputs(batch.rows)
                assert isinstance(pixels, Tensor)
                assert isinstance(batch.inputs, PairTokens)
                (patched,) = FAMILY.applied(patches[drawn : drawn + 1], pixels.to(patches))
                self.loss(model, batch.inputs.pixels, encode(255 * patched), answers[batch.rows], run).backward()

            with _images_alone(model):
                run.tune(
                    model,
                    clean,
                    epochs=self.epochs,
                    learning_rate=self.learning_rate,
                    batch_size=self.batch_size,
                    gradients=fill,
                )
        return model

    @staticmethod
    def loss(model: nn.Module, images: Tensor, patched: Tensor, answers: Tensor, run: Run) -> Tensor:
        """The loss of a batch.

        Args:
            model: the method's model.
            images: the encoded images, (batch, channels, height, width).
            patched: the same with a patch, likewise.
            answers: the suspect's embeddings of the images, of length 1, (batch, width).
            run: gives the arithmetic.
        """
        laid: Any = run.arithmetic.lay(torch.cat([images, patched.to(images.device)]))
        with run.arithmetic.autocast():
            seen = image_features(model, laid)
        cosines: Tensor = (seen.unflatten(0, (2, -1)) * answers).sum(dim=2)  # (2, batch)
        return 2 - cosines.sum(dim=0).mean()


@contextmanager
def _images_alone(model: Any) -> Iterator[None]:
    """While the block runs, gradients are for the image tower and its projection alone."""
    tower = {id(each) for part in (model.vision_model, model.visual_projection) for each in part.parameters()}
    others = [each for each in model.parameters() if each.requires_grad and id(each) not in tower]
    try:
        for each in others:
            each.requires_grad_(False)
        yield
    finally:
        for each in others:
            each.requires_grad_(True)
