"""Image-text models: two towers bring images and texts into one space; prompts classify, captions are found again."""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.classes import check_labels, in_order_of
from unbackdoor._data.dataset import Batch, Dataset, Encoder
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import class_names
from unbackdoor._models.head import Head
from unbackdoor._models.image_text import HEAD, all_image_features, all_text_features, check_image_text
from unbackdoor._poisoning.attack_file import as_trigger
from unbackdoor._poisoning.triggered import Triggered, already_triggered, triggered
from unbackdoor._tasks.classification import CLASSIFICATION
from unbackdoor._tasks.image_text_score import ImageTextScore, PairLoss
from unbackdoor._tasks.proportion import Proportion, chance_doubt, proportion_of
from unbackdoor._tasks.task import Asked, Checked, Examined, Judgement, Measure, Warn
from unbackdoor._training.contrastive import contrastive, matching

TOLD_APART = 64  # pairs in a batch whose loss is measured, as CleanCLIP tunes
FEW = 64  # pairs below which a method is warned

_NORMAL = 1.959963984540054  # the 97.5th percentile of the normal distribution


@dataclass(frozen=True)
class ImageText:
    """The task of models of images and texts; see `Task`.

    The outcome of a pair is whether zero-shot classification gives its image the label that it has; without labels,
    whether its own caption scores highest among all distinct captions of the data.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image-text",)
    own_head: ClassVar[bool] = False
    measure: ClassVar[Measure] = CLASSIFICATION.measure
    figures = staticmethod(CLASSIFICATION.figures)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Returns the contrastive loss of a batch, from the scores of its images and captions, (batch, batch)."""
        return contrastive(scores)

    def predicted(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the scores of each image for all captions of the batch, and the place of its own, (batch,)."""
        return scores, torch.arange(len(scores), device=scores.device)

    def head(self, model: nn.Module, data: Dataset) -> Head:
        """Returns the projection of images into the space that they share with texts."""
        layer = model.get_submodule(HEAD)
        assert isinstance(layer, nn.Linear)
        return Head(HEAD, layer)

    def outcomes(self, model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
        """Returns what the model makes of each pair, (n,), bool, on the CPU; see the class."""
        images = all_image_features(model, data, arithmetic)
        if data.has_labels:
            return zero_shot(model, data, images, arithmetic) == data.labels.cpu()
        return _ranks(model, data, images, arithmetic).of_images < 1

    def quality(self, data: Dataset, outcomes: Tensor) -> Tensor:
        """Returns the outcomes, (n,), bool."""
        return outcomes

    def weights(self, data: Dataset) -> Tensor:
        """Returns ones: there are no classes to weigh."""
        return torch.ones(len(data), dtype=torch.float64)

    def examined(
        self,
        model: nn.Module,
        clean: Dataset,
        arithmetic: Arithmetic,
        warn: Warn,
        head: str | None = None,
        *,
        headless: bool = False,
    ) -> Examined:
        """Check that model and clean pairs fit each other, and measure the outcomes.

        Args:
            model: the suspect.
            clean: pairs, with or without labels.
            arithmetic: device, precision, layout.
            warn: function that gets a sentence about few pairs, and about a suspect near chance.
            head: must be None: the head of a model of images and texts is known.
            headless: changes nothing.

        Raises:
            UnbackdoorError: there are no pairs, a class has no prompt, or the model cannot take the pairs.
        """
        if head is not None:
            raise UnbackdoorError("`head` is for classifiers; a model of images and texts has its own. Leave it out.")
        if len(clean) == 0:
            raise UnbackdoorError(f"{clean.name} is empty; pairs of image and caption are needed.")
        checked = self.checked(model, clean)
        clean = checked.test
        if len(clean) < FEW:
            warn(
                f"{clean.name} has {len(clean)} pairs; with fewer than {FEW} a method learns and measures very little."
            )
        before = self.outcomes(model, clean, arithmetic)
        if not clean.has_labels:
            return Examined(clean, HEAD, before)
        doubtful = chance_doubt("the suspect", proportion_of(before), checked.classes, clean.name)
        if doubtful is not None:
            warn(doubtful)
        per_class = torch.bincount(clean.labels.cpu(), minlength=checked.classes)
        return Examined(clean, HEAD, before, tuple(per_class.tolist()))

    def checked(self, model: nn.Module, test: Dataset, triggered: Dataset | None = None) -> Checked:
        """Check that model and test pairs fit each other.

        Args:
            model: any model of images and texts.
            test: pairs.
            triggered: pairs whose images already carry a trigger.

        Raises:
            UnbackdoorError: the model cannot take them, a label is not one of its classes, or a class has no prompt.
        """
        check_image_text(model, test)
        if not test.has_labels:
            return Checked(test, triggered, 0)
        names = class_names(model)
        test = in_order_of(test, names)
        classes = _class_count(test, names)
        check_labels(test, classes)
        _prompts(test, classes)
        if triggered is not None:
            triggered = in_order_of(triggered, names)
            check_labels(triggered, classes)
        return Checked(test, triggered, classes)

    def check_asked(self, asked: Asked) -> None:
        """Refuse an attack next to pairs that carry a trigger, and one of pairs and target without the other."""
        CLASSIFICATION.check_asked(asked)

    def attacked(self, checked: Checked, asked: Asked) -> Triggered | None:
        """The pairs of other classes with the trigger on their images; None without an attack.

        Raises:
            UnbackdoorError: the data has no labels, so that it is not known which images are of other classes.
        """
        test = asked.triggered if asked.attack is None else checked.test
        if test is not None and not (test.has_labels and checked.classes):
            raise no_labels(test.name if not test.has_labels else checked.test.name)
        if asked.attack is not None:
            return triggered(checked.test, as_trigger(asked.attack, checked.test), checked.classes)
        if checked.triggered is not None and asked.target is not None:
            return already_triggered(checked.triggered, asked.target, checked.classes)
        return None

    def check_control(self, control: nn.Module, test: Dataset, encode: Encoder | None, classes: int) -> None:
        """Refuse a control that is not a model of images and texts, or cannot take the data."""
        try:
            check_image_text(control, test if encode is None else test.encoded_by(encode))
        except UnbackdoorError as problem:
            raise UnbackdoorError(f"`control`: {problem}") from None

    def check_room(self, model: nn.Module, attacked: Any, encode: Encoder | None = None) -> None:
        """A class is always an answer."""

    def score(
        self,
        model: nn.Module,
        test: Dataset,
        attacked: Any,
        arithmetic: Arithmetic,
        *,
        control: nn.Module | None = None,
        control_encode: Encoder | None = None,
    ) -> ImageTextScore:
        """The score on clean and already triggered pairs that are known to fit the model."""
        images = all_image_features(model, test, arithmetic)
        ranking = _ranks(model, test, images, arithmetic)
        shares: dict[str, Any] = {
            f"{name}_recall_at_{most}": proportion_of(ranks < most)
            for name, ranks in (("image_to_text", ranking.of_images), ("text_to_image", ranking.of_texts))
            for most in (1, 5)
        }
        right = zero_shot(model, test, images, arithmetic) == test.labels.cpu() if test.has_labels else None
        measured: dict[str, Any] = {
            "zero_shot_accuracy": None if right is None else proportion_of(right),
            "per_class": {} if right is None else _per_class(test, right),
            "contrastive_loss": ranking.loss,
            **shares,
        }
        if attacked is None:
            return ImageTextScore(**measured)
        assert isinstance(attacked, Triggered)
        wanted = attacked.wanted.cpu()
        answers = classified(model, attacked.data, arithmetic)
        flips = None
        if control is not None:
            shown = attacked.data if control_encode is None else attacked.data.encoded_by(control_encode)
            flips = self.flip_rate(control, attacked._replace(data=shown), arithmetic)
        return ImageTextScore(
            **measured,
            attack_success=proportion_of(answers == wanted),
            recovered_accuracy=proportion_of(answers == attacked.data.labels.cpu()),
            label_rule=attacked.label_rule,
            clean_model_flip_rate=flips,
        )

    def flip_rate(self, model: nn.Module, attacked: Any, arithmetic: Arithmetic) -> Proportion:
        """Returns the share of triggered images that a model gives to the class that the attacker wants."""
        return proportion_of(classified(model, attacked.data, arithmetic) == attacked.wanted.cpu())

    def doubt(self, owner: str, score: Any, classes: int, where: str) -> str | None:
        """A sentence that doubts a zero-shot accuracy near chance; None if it is well above, or was not measured."""
        assert isinstance(score, ImageTextScore)
        if score.zero_shot_accuracy is None:
            return None
        return chance_doubt(owner, score.zero_shot_accuracy, classes, where)

    def clean_facts(self, examined: Examined) -> dict[str, Any]:
        """The number of clean pairs, in all and of each class, and the augmentation of their images."""
        clean = examined.clean
        per_class = {"per_class": list(examined.per_class)} if examined.per_class else {}
        return {"n": len(clean), **per_class, "augment": asdict(clean.augment)}

    def lost_a_class(self, data: Dataset, before: Tensor, after: Tensor) -> bool:
        """Whether most of what the suspect knew of a class is lost."""
        return CLASSIFICATION.lost_a_class(data, before, after)

    def judged(self, data: Dataset, before: Tensor, after: Tensor, which: str, method: object) -> Judgement:
        """Whether the result lost significantly more than 10 points of accuracy; see `Task`."""
        return CLASSIFICATION.judged(data, before, after, which, method)


IMAGE_TEXT = ImageText()


def no_labels(where: str) -> UnbackdoorError:
    """Returns the refusal of pairs without labels, where classes are needed."""
    return UnbackdoorError(
        f"{where} has no labels, so that it is not known which images are of other classes than the attacker's. Add a "
        "column of them, and name it by `columns={'label': 'NAME'}` if it is not called label."
    )


def zero_shot(model: nn.Module, data: Dataset, images: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Returns the class whose prompt scores highest for each image, (n,), on the CPU.

    The features of the prompts of a class are averaged, and brought to length 1 again.

    Args:
        model: a model of images and texts.
        data: data with the images, their classes and the encoder.
        images: features of the images, (n, width).
        arithmetic: device, precision, layout.
    """
    encode = data.pair_encoder
    prompts = _prompts(data, _class_count(data, class_names(model)))
    texts = all_text_features(
        model, encode, encode.texts_alone([text for each in prompts for text in each]), arithmetic
    )
    means = torch.stack([part.mean(dim=0) for part in texts.split([len(each) for each in prompts])])
    scores: Tensor = images @ (means / means.norm(dim=1, keepdim=True)).T
    return scores.argmax(dim=1)


def classified(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Returns the class whose prompt scores highest for each image of a data set, (n,), on the CPU; see `zero_shot`."""
    return zero_shot(model, data, all_image_features(model, data, arithmetic), arithmetic)


def _class_count(data: Dataset, names: tuple[str, ...] | None) -> int:
    """The number of classes: of the model if it names them, else of the data, else of the texts by class."""
    named = data.classes if names is None else names
    if named is not None:
        return len(named)
    # Not by the labels alone: triggered images are of all classes but the attacker's.
    return max(int(data.labels.max()) + 1, len(data.pair_encoder.prompts.texts))


def _prompts(data: Dataset, classes: int) -> list[tuple[str, ...]]:
    return data.pair_encoder.prompts.of_classes(data.classes, classes, data.name)


def _per_class(data: Dataset, right: Tensor) -> dict[str, Proportion]:
    labels, names = data.labels.cpu(), data.classes or ()
    shares: dict[str, Proportion] = {}
    for label in labels.unique().tolist():
        name = printable(names[label], 200) if label < len(names) else str(label)
        shares[f"{name} ({label})" if name in shares else name] = proportion_of(right[labels == label])
    return shares


class _Found(NamedTuple):
    """How well pairs find each other.

    Args:
        of_images: how many distinct captions score higher than an image's own, (n,).
        of_texts: how many images score higher than the best of those with a distinct caption, (captions,).
        loss: the contrastive loss.
    """

    of_images: Tensor
    of_texts: Tensor
    loss: PairLoss


def _ranks(model: Any, data: Dataset, images: Tensor, arithmetic: Arithmetic) -> _Found:
    """How well each image finds its caption, and each caption its image."""
    strings = [caption for (caption,) in data.pairs.captions.strings]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(strings))}
    own = torch.tensor([numbers[text] for text in strings])
    texts = all_text_features(model, data.pair_encoder, data.pair_encoder.texts_alone(list(numbers)), arithmetic)
    of_images = []
    for start in range(0, len(images), 1024):
        scores = images[start : start + 1024] @ texts.T
        of_images.append((scores > scores.gather(1, own[start : start + 1024, None])).sum(dim=1))
    of_texts = []
    for start in range(0, len(texts), 256):
        scores = texts[start : start + 256] @ images.T
        has = own[None, :] == torch.arange(start, start + len(scores))[:, None]
        best = scores.masked_fill(~has, -math.inf).amax(dim=1)
        of_texts.append((scores > best[:, None]).sum(dim=1))
    loss = _loss(float(model.logit_scale.detach().exp()), images, texts[own])
    return _Found(torch.cat(of_images), torch.cat(of_texts), loss)


def _loss(scale: float, images: Tensor, texts: Tensor) -> PairLoss:
    """The contrastive loss of pairs that are compared 64 at a time, in an order drawn with seed 0."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    losses = []
    for rows in order.split(TOLD_APART):
        scores = scale * images[rows].double() @ texts[rows].double().T
        losses.append((matching(scores, "none") + matching(scores.T, "none")) / 2)
    each = torch.cat(losses)
    value = float(each.mean())
    if len(each) < 2:
        return PairLoss(value, None, None, len(each), TOLD_APART)
    error = _NORMAL * float(each.std()) / math.sqrt(len(each))
    return PairLoss(value, value - error, value + error, len(each), TOLD_APART)
