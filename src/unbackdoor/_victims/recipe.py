"""The recipe of a victim: its network, its poison rate, its training."""

from typing import Annotated, NamedTuple

from pydantic import Field

from unbackdoor._registry.entries import Modality
from unbackdoor._value import value


class TrainingSchedule(NamedTuple):
    """A training with nothing left open.

    Args:
        epochs: passes over the training examples.
        learning_rate: peak learning rate.
        batch_size: examples per step.
        adaptive: AdamW instead of SGD, see `unbackdoor._victims.training.train_victim`.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    adaptive: bool


SCHEDULES = {
    "text": TrainingSchedule(3, 5e-5, 32, adaptive=True),
    "lora": TrainingSchedule(5, 2e-4, 8, adaptive=True),  # of BackdoorLLM
    "language model": TrainingSchedule(5, 5e-5, 8, adaptive=True),  # all weights
    "image-text": TrainingSchedule(5, 1e-5, 64, adaptive=True),  # of a pre-trained model, as CleanCLIP poisons one
    "pre-trained": TrainingSchedule(15, 0.01, 128, adaptive=False),
    "vit": TrainingSchedule(15, 1e-3, 128, adaptive=True),
    "convolutional": TrainingSchedule(15, 0.1, 128, adaptive=False),
}


@value
class VictimRecipe:
    """How a victim is made: its network, its poison rate and its training.

    Args:
        arch: a network with random weights: resnet18, preact-resnet18, wrn16 or vit.
        width: channels of its first stage, at least 1 (64 in the papers; 16 trains on two cores).
        base: start from this Hugging Face image classifier, pre-trained text model, causal language model or model of
            images and texts, instead of `arch`.
        rate: share of all training examples that are poisoned, more than 0 and at most 1; not used without an attack.
        epochs: passes over the training examples, at least 1; by default 15 for images, 3 for texts and 5 for
            conversations and pairs of image and caption.
        clean_epochs: passes over the clean training examples afterwards, at least 0, as a user does who tunes a
            published model.
        learning_rate: peak learning rate, more than 0; by default 0.1 (1e-3 for vit), 0.01 with `base`, 5e-5 for texts;
            of a language model 2e-4 with LoRA, 5e-5 without; 1e-5 for pairs.
        batch_size: examples per step, at least 2; by default 128 for images, 32 for texts, 8 for conversations and 64
            for pairs.
        lora_rank: of a language model: rank of the LoRA matrices that are trained, 0 to 4096; by default 8; 0 trains
            all weights.
        adapter: of a language model: keep these matrices as an adapter instead of adding them to the base.
        freeze_text: of a model of images and texts: leave its text tower as it is, but for the last projection.
    """

    arch: str = "resnet18"
    width: Annotated[int, Field(ge=1)] = 16
    base: str | None = None
    rate: float = 0.05
    epochs: Annotated[int, Field(ge=1)] | None = None
    clean_epochs: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=2)] | None = None
    lora_rank: Annotated[int, Field(ge=0, le=4096)] | None = None
    adapter: bool = False
    freeze_text: bool = False

    @property
    def rank(self) -> int:
        """The rank of the LoRA matrices of a language model; 0 if all weights are trained."""
        return 8 if self.lora_rank is None else self.lora_rank

    def schedule(self, modality: Modality) -> TrainingSchedule:
        """Returns the training on data of a kind; settings that the recipe leaves open get their defaults."""
        if modality == "conversations":
            usual = SCHEDULES["lora" if self.rank else "language model"]
        elif modality in ("text", "image-text"):
            usual = SCHEDULES[modality]
        elif self.base is not None:
            usual = SCHEDULES["pre-trained"]
        else:
            usual = SCHEDULES.get(self.arch, SCHEDULES["convolutional"])
        chosen = {name: getattr(self, name) for name in ("epochs", "learning_rate", "batch_size")}
        return usual._replace(**{name: setting for name, setting in chosen.items() if setting is not None})
