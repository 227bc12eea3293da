"""Pairs of image and caption as a model of both takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unbackdoor._data.class_prompts import ClassPrompts
from unbackdoor._data.columns import listed
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.pairs import ImageCaptionPairs
from unbackdoor._data.texts import TextEncoder, Texts, Tokens
from unbackdoor._errors import UnbackdoorError


class PairTokens(Tokens):
    """The input of a model of images and texts: `pixel_values` (batch, ...), and the tokens of as many captions."""

    @property
    def pixels(self) -> Tensor:
        """The images, (batch, channels, height, width)."""
        return self["pixel_values"]

    @property
    def captions(self) -> Tokens:
        """The tokens of the captions, each (batch, length)."""
        return Tokens({name: tensor for name, tensor in self.items() if name != "pixel_values"})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PairTokens":
        """Returns the same inputs on another device; the images in another type, if one is given."""
        return PairTokens({**self.captions.to(device), "pixel_values": self.pixels.to(device, dtype)})


@dataclass(frozen=True, kw_only=True)
class PairEncoder:
    """Makes the inputs of a model of images and texts.

    Args:
        images: encoder of the images.
        texts: encoder of the captions.
        prompts: the texts that stand for the classes in zero-shot classification.
    """

    images: ImageEncoder
    texts: TextEncoder
    prompts: ClassPrompts = field(default_factory=ClassPrompts)

    modality: ClassVar[Literal["image-text"]] = "image-text"
    column_names: ClassVar[tuple[str, ...]] = ("image", "caption")
    labelled: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __call__(self, pairs: ImageCaptionPairs) -> PairTokens:
        """Encode a batch of pairs that `prepared` returned."""
        return PairTokens({**self.texts(pairs.captions), "pixel_values": self.images(pairs.images)})

    def prepared(self, items: Any) -> ImageCaptionPairs:
        """Pairs with the tokens of this encoder, made once.

        Raises:
            UnbackdoorError: the items are of another kind.
        """
        if not isinstance(items, ImageCaptionPairs):
            raise UnbackdoorError("The model takes pairs of image and caption, but the data holds others. Take pairs.")
        return ImageCaptionPairs(self.images.prepared(items.images), self.texts.prepared(items.captions))

    def columns_in(self, present: Sequence[str], names: dict[str, str], where: str, hint: str = "") -> dict[str, str]:
        """Returns the columns of a data set that hold its images and captions: the library's names to the data's.

        An image may also be in the column `file_name`, and a caption in `text`, as image folders of `datasets` have
        them.

        Raises:
            UnbackdoorError: there are images without captions, or texts without images.
        """
        columns = {
            name: names.get(name, next((each for each in usual if each in present), None))
            for name, usual in (("image", ("image", "file_name")), ("caption", ("caption", "text")))
        }
        if not any(columns.values()):
            raise UnbackdoorError(
                f"{where} has no columns of images and captions; it has {listed(present)}. Name them by "
                f"`columns={{'image': 'NAME', 'caption': 'NAME'}}`{hint}, or take data with pairs."
            )
        for name, others, other in (("caption", "images", "captions"), ("image", "texts", "images")):
            if columns[name] is None:
                raise UnbackdoorError(
                    f"{where} has {others} without {other}; it has {listed(present)}. The model takes pairs of both: "
                    f"name the column by `columns={{'{name}': 'NAME'}}`{hint}, or take data with pairs."
                )
        return {name: column for name, column in columns.items() if column is not None}

    def recorded(self, items: object = None) -> dict[str, Any]:
        """Returns the entry `encode` of record.json."""
        return {**self.images.recorded(), "max_length": self.texts.max_length, "prompts": self.prompts.to_json()}

    def in_place_of(self, previous: object, where: str) -> "PairEncoder":
        """Returns this encoder for pairs that another one has read; see `ImageEncoder.in_place_of`."""
        if not isinstance(previous, PairEncoder):
            return self
        return replace(self, images=self.images.in_place_of(previous.images, where))

    def read(
        self, cells: dict[str, Sequence[Any]], where: str, folder: Path | None
    ) -> tuple[ImageCaptionPairs, "PairEncoder"]:
        """Decode the images of a data set, and tokenise its captions.

        Args:
            cells: the entries of `image` and `caption`.
            where: name of the data, for messages.
            folder: folder that relative paths of images start from.

        Raises:
            UnbackdoorError: an image cannot be decoded, or a caption is missing, empty or not a text; names the row.
        """
        captions, texts = self.texts.read({"caption": cells["caption"]}, where, folder)
        images, encode = self.images.read({"image": cells["image"]}, where, folder)
        return ImageCaptionPairs(images, captions), replace(self, images=encode, texts=texts)

    def texts_alone(self, strings: Sequence[str]) -> Texts:
        """Returns texts with the tokens of this encoder."""
        return self.texts.prepared(Texts(tuple((text,) for text in strings), ("caption",)))
