"""STRIP: the class of an input with a trigger survives being mixed with clean inputs."""

from dataclasses import replace
from random import Random
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.geometry import resized
from unbackdoor._data.images import ImageEncoder
from unbackdoor._guarding.deciding import class_scores
from unbackdoor._guarding.draws import draws_for
from unbackdoor._guarding.guard import Learnt, Scored
from unbackdoor._purification.run import Run
from unbackdoor._value import value
from unbackdoor.guards._words import exchanged, packed, spans, texts_like, unpacked

KEPT = 128  # clean pictures to mix with


@value
class Strip:
    """Mix an input with clean ones several times, and reject it if the model stays sure of one class.

    The score is the entropy in bits of the model's class probabilities, averaged over the copies: log2 of the number of
    classes if every copy leaves it open, 0 if all are classified with certainty. Copies of a picture are sums of it and
    clean pictures, in the size at which the model gets them; copies of a text have some of its words exchanged for
    words of clean texts.

    Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019,
    https://arxiv.org/abs/1902.06531

    Cannot see: triggers that mixing destroys or that make the model less sure, and triggers of certain classes only.

    Args:
        copies: number of mixed copies of each input, 1 to 1,000; None is 16 for images and 5 for texts.
        share: share of the words that are exchanged, or of pictures the weight of the clean one, which is added to the
            input and cut at white; more than 0 and at most 1; None is 1 for images and 0.5 for texts.

    Differences from the paper: the draws belong to the input and the seed, so that an input gets the same score in any
    batch. Published code for texts averages over copies of different texts; here each text has its own. Words to
    exchange are drawn without replacement, from all words of the clean texts and not from the rarer ones.
    """

    copies: Annotated[int, Field(ge=1, le=1000)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None

    measure: ClassVar[str] = "the entropy over mixed copies in bits"
    suspicious: ClassVar[Literal["low", "high"]] = "low"
    defaults: ClassVar[dict[str, dict[str, float]]] = {
        "images": {"copies": 16, "share": 1.0},
        "text": {"copies": 5, "share": 0.5},
    }

    def __call__(self, model: nn.Module, clean: Dataset, run: Run) -> dict[str, Tensor]:
        """Keep clean pictures, or the words of clean texts, to mix with."""
        if clean.modality == "text":
            _check_words(clean, float(run.setting(self, "share")), run)
        return TO_MIX[clean.modality](_placed(clean), run)

    def scores(self, model: nn.Module, inputs: Dataset, learnt: Learnt, run: Run) -> Scored:
        """The entropies of inputs, (n,)."""
        copies, share = int(run.setting(self, "copies")), float(run.setting(self, "share"))
        inputs = _placed(inputs)
        draws = [draws_for(identity, run.seed) for identity in inputs.to("cpu").identities()]
        bits = []
        for rows in torch.arange(len(inputs)).split(max(run.arithmetic.evaluation_batch // copies, 1)):
            some = [draws[row] for row in rows.tolist()]
            mixed = MIXED[inputs.modality](inputs.select(rows), some, learnt, copies, share)
            probabilities = class_scores(model, mixed, run).double().softmax(dim=1)
            each = -(torch.special.xlogy(probabilities, probabilities) / torch.log(torch.tensor(2.0))).sum(dim=1)
            bits.append(each.view(len(rows), copies).mean(dim=1))
        return Scored(torch.cat(bits))


def _check_words(clean: Dataset, share: float, run: Run) -> None:
    """Warn if most texts have no word to exchange, such as those of a language that writes no spaces."""
    count = sum(not any(round(share * len(spans(text))) for text in sides) for sides in clean.texts.strings)
    if 2 * count > len(clean):
        run.warn(
            f"Strip exchanges words between spaces, and {count:,} of {len(clean):,} clean texts have too few of them "
            "(Chinese has none): their scores show how sure the model is, and nothing else. Try badacts."
        )


def _placed(data: Dataset) -> Dataset:
    """Pictures in the size at which the model gets them, so that those of any size can be mixed; texts as they are."""
    if not isinstance(data.encode, ImageEncoder) or data.encode.done:
        return data
    data.encode.target((data.pixels.shape[-2], data.pixels.shape[-1]))  # refuses sizes that nobody takes
    return replace(data, items=data.encode.placed(data.pixels), encode=replace(data.encode, done=True))


def _pictures_to_mix(clean: Dataset, run: Run) -> dict[str, Tensor]:
    chosen = torch.randperm(len(clean), generator=run.generator)[:KEPT]
    return {"pictures": clean.pixels[chosen.to(clean.pixels.device)].clone()}


def _words_to_mix(clean: Dataset, run: Run) -> dict[str, Tensor]:
    words = sorted({word for strings in clean.texts.strings for text in strings for word in text.split()})
    return {"words": packed(words)}


def _mixed_pictures(inputs: Dataset, draws: list[Random], learnt: Learnt, copies: int, share: float) -> Dataset:
    """The copies of each picture, one after the other."""
    own = inputs.pixels.float()
    clean = resized(learnt["pictures"].to(own.device), (own.shape[-2], own.shape[-1]), "bilinear")
    rows = torch.tensor([draw.choices(range(len(clean)), k=copies) for draw in draws], device=own.device)
    each = [
        (own + share * clean[rows[:, copy]].float()).clamp(max=255).round().to(torch.uint8) for copy in range(copies)
    ]
    sums = torch.stack(each, dim=1).flatten(0, 1)
    return Dataset(items=sums, labels=torch.full((len(sums),), -1), encode=inputs.encode, name=inputs.name)


def _mixed_texts(inputs: Dataset, draws: list[Random], learnt: Learnt, copies: int, share: float) -> Dataset:
    """The copies of each text or pair, one after the other."""
    words = unpacked(learnt["words"])
    strings = [
        tuple(_changed(text, words, share, draw) for text in sides)
        for sides, draw in zip(inputs.texts.strings, draws, strict=True)
        for _ in range(copies)
    ]
    return texts_like(inputs, strings)


TO_MIX = {"images": _pictures_to_mix, "text": _words_to_mix}  # by the kind of data
MIXED = {"images": _mixed_pictures, "text": _mixed_texts}


def _changed(text: str, words: list[str], share: float, draw: Random) -> str:
    """A text with a share of its words exchanged, at places drawn without replacement."""
    count = len(spans(text))
    places = draw.sample(range(count), round(share * count))
    return exchanged(text, {place: draw.choice(words) for place in places})
