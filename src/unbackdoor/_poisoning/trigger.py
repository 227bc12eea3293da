"""A trigger: an attack and its arrays, which are put on pictures of 8 bits or on texts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset, ItemsLike
from unbackdoor._data.images import Images
from unbackdoor._data.pairs import ImageCaptionPairs
from unbackdoor._data.texts import Texts
from unbackdoor._errors import UnbackdoorError
from unbackdoor._poisoning.abilities import phrases_of, side_of
from unbackdoor._poisoning.attack import Attack
from unbackdoor._poisoning.behaviour import Behaviour
from unbackdoor._poisoning.check import check_modality
from unbackdoor._poisoning.prompts import changed_prompts

logger = logging.getLogger("unbackdoor")


@dataclass(frozen=True)
class Trigger:
    """An attack together with the arrays that its trigger is made of.

    Args:
        attack: the attack.
        arrays: the arrays of its trigger; none for words.
        behaviour: what a language model should answer to the trigger; None for classifiers.
    """

    attack: Attack
    arrays: dict[str, Tensor]
    behaviour: Behaviour | None = None

    @classmethod
    def of(cls, attack: Attack, data: Dataset, behaviour: Behaviour | None = None) -> "Trigger":
        """Returns the trigger of an attack on texts or conversations, or on images of the shape of `data`.

        Raises:
            UnbackdoorError: the attack is for data of another kind, or its trigger cannot be made for that shape.
        """
        check_modality(attack, data)
        return cls(attack, attack.arrays(data.shape), behaviour)

    def stamp(self, items: ItemsLike) -> ItemsLike:
        """Trigger uint8 images (n, channels, height, width), rounded to 8 bits as exported pictures are; or texts.

        In conversations the last message carries the trigger, and the answers stay; of pairs the image, and the caption
        stays.
        """
        return self.changed(items, self.attack.apply)

    def changed(self, items: ItemsLike, change: Callable[[Any, dict[str, Tensor]], Any]) -> ItemsLike:
        """Apply a function to the part of items that carries triggers, as `stamp` does.

        Args:
            items: images, texts, conversations or pairs.
            change: makes other pixels in [0, 1] or other texts of some, and of the arrays on their device.
        """
        if isinstance(items, ImageCaptionPairs):
            return replace(items, images=Images(cast(Tensor, self.changed(items.images, change))))
        if isinstance(items, Texts):
            return stamped_texts(items, self.attack, lambda texts: change(texts, self.arrays))
        if isinstance(items, Conversations):
            return changed_prompts(items, lambda texts: change(texts, self.arrays))
        return stamped(cast(Tensor, items), lambda pixels: change(pixels, self._on(pixels.device)))

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: array.to(device) for name, array in self.arrays.items()}


def stamped(items: Tensor, change: Any, chunk: int = 128) -> Tensor:
    """Apply a function of pixels in [0, 1] to uint8 images, in chunks that fit a cache, and round to 8 bits."""
    if len(items) == 0:
        return items
    parts = [change(part.float() / 255).mul(255).round().clamp(0, 255).to(torch.uint8) for part in items.split(chunk)]
    return torch.cat(parts)


def stamped_texts(items: Texts, attack: Attack, change: Callable[[list[str]], list[str]]) -> Texts:
    """Apply a function of a list of texts to the side of each pair that the attack is on; not yet tokenised."""
    side = side_of(attack)
    columns = [list(column) for column in zip(*items.strings, strict=True)]
    if side == "b" and columns and len(columns) < 2:
        raise UnbackdoorError(f"{type(attack).__name__}.side is b, but the data holds single texts. Use side a.")
    for place in range(len(columns)):
        if side == "both" or place == "ab".index(side):
            columns[place] = change(columns[place])
    return Texts(tuple(zip(*columns, strict=True)), items.columns)


def warn_of_cut_triggers(clean: Dataset, shown: Dataset, attack: Attack, what_of_them: str) -> None:
    """Warn of triggered texts whose trigger, or a part of it, lies beyond the tokens that the model reads."""
    before, after = clean.texts.tokens, shown.texts.tokens
    width = min(before["input_ids"].shape[1], after["input_ids"].shape[1])
    same = (before["input_ids"][:, :width] == after["input_ids"][:, :width]).all(dim=1)
    same &= clean.texts.lengths == shown.texts.lengths
    encode = shown.text_encoder
    lost = int((same | encode.loses(shown.texts, phrases_of(attack))).sum())
    if lost:
        logger.warning(
            "%s: the trigger is cut off, wholly or in part, in %s texts, since the model reads %d tokens; %s. Raise "
            "`max_length`, or place the trigger at the %s.",
            clean.name,
            f"{lost:,} of {len(clean):,}",
            encode.max_length,
            what_of_them,
            "end" if shown.tokenizer.truncation_side == "left" else "start",
        )
