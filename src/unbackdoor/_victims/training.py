"""Training a victim: an untrained network, the loop that all victims share, a count of the examples seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from unbackdoor import archs
from unbackdoor._data.classes import check_labels
from unbackdoor._data.dataset import Dataset
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.labels import alike
from unbackdoor._errors import NoHeadError, UnbackdoorError
from unbackdoor._models.arithmetic import HALF, Arithmetic, Precision, choose, relayout_
from unbackdoor._models.calling import class_count, class_names, probe
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.head import head_of
from unbackdoor._models.image_text import name_classes_
from unbackdoor._models.recomputing import kept_, recomputed_
from unbackdoor._progress import Progress, silent
from unbackdoor._purification.form import Form
from unbackdoor._tasks.choice import task_of
from unbackdoor._tasks.task import Task
from unbackdoor._training.contrastive import frozen_text_tower
from unbackdoor._training.descent import Change, Gradients, Loss, cross_entropy, descend
from unbackdoor._training.lora import adapted, check_peft, merged
from unbackdoor._victims.recipe import TrainingSchedule, VictimRecipe


@dataclass(kw_only=True)
class Trainer:
    """Makes networks by a recipe and trains them, and counts the examples that they see.

    Args:
        recipe: recipe of the victim.
        seed: seed of the initial weights, of shuffling and of augmentation.
        classes: class names in label order; none for conversations.
        data: the clean training data, encoded as the victim takes it.
        base: the checked directory of the recipe's `base`, if it has one.
        device: None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        progress: progress of the training.
        max_new_tokens: of a language model: tokens of the longest answer that is scored; None for the usual number.
        gradient_checkpointing: whether blocks compute again what their backward pass needs; see `recomputed_`.
        attacked: triggered examples that the victim is scored on, as `Task.attacked` returns them; None for none.
        examples_seen: number of examples seen by all trainings so far.
        form: of a language model, one of images and texts, or a base in half precision: the number types of its
            weights, which the victim gets back.
    """

    recipe: VictimRecipe
    seed: int
    classes: list[str]
    data: Dataset
    base: ModelDirectory | None = None
    device: str | None = None
    precision: Precision = "auto"
    progress: Progress = silent
    max_new_tokens: int | None = None
    gradient_checkpointing: bool = False
    attacked: Any = None
    examples_seen: int = 0
    form: Form | None = None

    @classmethod
    def of(cls, data: Dataset, recipe: VictimRecipe, **settings: Any) -> "Trainer":
        """The trainer for some data, of which it takes the classes and the encoder.

        Raises:
            UnbackdoorError: the data has labels without a class, or is text and the recipe has no `base`; or that
                cannot be used; or the recipe has settings for another kind of model.
        """
        if data.modality != "images" and recipe.base is None:
            raise no_base()
        _check_recipe(recipe, data)
        classes: list[str] = []
        if data.modality != "conversations":
            classes = list(data.classes or map(str, range(int(data.labels.max()) + 1)))
            check_labels(data, len(classes))
        encode = normalisation(data) if recipe.base is None else data.encode
        if isinstance(encode, ImageEncoder):  # whether pictures are resized already differs between data sets
            encode = replace(encode, done=False)
        base = None if recipe.base is None else ModelDirectory.of(recipe.base, "`base`")
        return cls(recipe=recipe, classes=classes, data=data.encoded_by(encode), base=base, **settings)

    @property
    def schedule(self) -> TrainingSchedule:
        """The recipe's training for this data."""
        return self.recipe.schedule(self.data.modality)

    @property
    def task(self) -> Task:
        """The task of the victim."""
        return task_of(self.data.encode, max_new_tokens=self.max_new_tokens, progress=self.progress)

    def fresh(self) -> nn.Module:
        """An untrained network, or the pre-trained one with a new head; always the same one."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = fresh_network(self.recipe, self.base, self.classes, self.data)
        halved = any(parameter.dtype in HALF for parameter in network.parameters())
        if halved or self.data.modality in ("conversations", "image-text"):
            self.form = Form.of(network)
            network.float()  # half precision is too coarse for small steps
        self.task.check_room(network, self.attacked)
        if self.gradient_checkpointing:
            recomputed_(network)
        return network

    def finished(self, model: nn.Module) -> nn.Module:
        """The trained model, or the base below an adapter, with the number types that the base came in."""
        kept_(model.modules())
        if self.form is None:
            return model
        if hasattr(model, "peft_config"):
            for name, parameter in model.named_parameters():
                if "lora_" not in name:
                    own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
                    parameter.data = parameter.data.to(self.form.types[own])
        else:
            self.form.restore_(model, "The training")
        return model

    def arithmetic(self, model: nn.Module) -> Arithmetic:
        """Device, precision and layout for a model."""
        return choose(model, self.device, self.precision)

    def train(self, model: nn.Module, data: Dataset, **changes: Any) -> nn.Module:
        """Train a model in place by the recipe, except for `changes`; see `train_victim`.

        By a recipe with LoRA, matrices are trained next to the weights of a language model and then added to them; or
        returned with the model, as an adapted one, which is trained on as it is.

        Raises:
            UnbackdoorError: the training diverged.
        """
        settings: dict[str, Any] = {"loss": self.task.loss, **self.schedule._asdict(), **changes}
        lora = self.data.modality == "conversations" and self.recipe.rank > 0 and not hasattr(model, "peft_config")
        if lora:
            model = adapted(model, rank=self.recipe.rank, seed=self.seed)
        if self.recipe.freeze_text:
            arithmetic = self.arithmetic(model)
            settings["gradients"] = frozen_text_tower(arithmetic.place(model), data, arithmetic, settings["loss"])
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            train_victim(
                model,
                data,
                seed=self.seed,
                arithmetic=self.arithmetic(model),
                progress=self.progress,
                **settings,
            )
        if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
            raise UnbackdoorError(
                f"The training diverged: the victim's weights are not finite. Lower `learning_rate`, which is "
                f"{self.schedule.learning_rate:g}."
            )
        self.examples_seen += settings["epochs"] * len(data)
        if self.recipe.freeze_text:
            model.requires_grad_(True)
        return merged(model) if lora and not self.recipe.adapter else model


def no_base() -> UnbackdoorError:
    """Returns the refusal of a text victim without a base."""
    return UnbackdoorError(
        "A text victim needs `base`: a pre-trained model to start from, such as bert-base-uncased, or for prompts a "
        "causal language model."
    )


def _check_recipe(recipe: VictimRecipe, data: Dataset) -> None:
    """Refuse settings for other models than the data is for, LoRA without its package, and pairs without labels."""
    if recipe.freeze_text and data.modality != "image-text":
        raise UnbackdoorError(
            f"`freeze_text` is for models of images and texts, but {data.name} holds {data.modality}. Leave it out."
        )
    if data.modality == "conversations":
        if recipe.rank:
            check_peft()
        elif recipe.adapter:
            raise UnbackdoorError("`adapter` keeps LoRA matrices, so that `lora_rank` must be at least 1, got 0.")
        return
    named = [name for name in ("lora_rank", "adapter") if getattr(recipe, name) not in (None, False)]
    if named:
        raise UnbackdoorError(
            f"`{named[0]}` is for language models, but {data.name} holds {data.modality}. Leave it out."
        )
    if data.modality == "image-text" and not data.has_labels:
        raise UnbackdoorError(
            f"{data.name} has no labels, by which the captions of a class are found and the trained model is scored. "
            "Add a column of them."
        )
    if data.modality == "image-text":
        data.pair_encoder.prompts.of_classes(data.classes, int(data.labels.max()) + 1, data.name)


def normalisation(data: Dataset) -> ImageEncoder:
    """Normalisation to mean 0 and deviation 1 per channel, measured on the training data."""
    pixels = data.pixels[:: max(1, len(data) // 10_000)].float() / 255
    mean = tuple(round(float(part), 4) for part in pixels.mean(dim=(0, 2, 3)))
    std = tuple(max(round(float(part), 4), 1e-3) for part in pixels.std(dim=(0, 2, 3)))
    channels, height, width = data.shape
    return ImageEncoder(mean=mean, std=std, size=(height, width), channels=channels)


def fresh_network(recipe: VictimRecipe, base: ModelDirectory | None, classes: list[str], data: Dataset) -> nn.Module:
    """An untrained network, or a pre-trained one, with a new head if its classes are others.

    Args:
        recipe: names the untrained network.
        base: the pre-trained one; None for an untrained one.
        classes: class names in label order.
        data: data that it will be trained on.

    Raises:
        UnbackdoorError: the network is not known, or does not fit the data.
    """
    if base is None:
        return _random_network(recipe, classes, data)
    return _PRETRAINED[data.modality](base, classes, data)


def _language_model(base: ModelDirectory, classes: list[str], data: Dataset) -> nn.Module:
    model: nn.Module = base.language_model()
    return model


def _image_text_model(base: ModelDirectory, classes: list[str], data: Dataset) -> nn.Module:
    model: nn.Module = base.image_text_model()
    name_classes_(model, classes)
    return model


def _text_classifier(base: ModelDirectory, classes: list[str], data: Dataset) -> nn.Module:
    model: nn.Module = base.fresh_classifier(classes)
    model.config.pad_token_id = data.tokenizer.pad_token_id  # type: ignore[union-attr]
    return model


def _random_network(recipe: VictimRecipe, classes: list[str], data: Dataset) -> nn.Module:
    channels, height, width = data.shape
    if height != width and recipe.arch == "vit":
        raise UnbackdoorError(f"`arch='vit'` needs square images, got {width}x{height} in {data.name}.")
    network: nn.Module = archs.build(
        recipe.arch, classes=classes, channels=channels, image_size=height, width=recipe.width
    )
    return network


def _image_classifier(base: ModelDirectory, classes: list[str], data: Dataset) -> nn.Module:
    model: Any = base.classifier()
    known = class_count(model, data)
    if known != len(classes):
        try:
            head = head_of(model, probe(model, data))
        except NoHeadError:
            raise UnbackdoorError(
                f"{base.path} answers with {known} classes and has no final linear layer that makes their scores, in "
                f"whose place one for the {len(classes)} of {data.name} could be put. Take another `base`."
            ) from None
        parent, _, child = head.name.rpartition(".")
        new_head = nn.Linear(head.layer.in_features, len(classes), bias=head.layer.bias is not None)
        setattr(model.get_submodule(parent), child, new_head)
        model.config.num_labels = len(classes)
        model.num_labels = len(classes)
    else:
        classes = _in_order_(model, classes, data)
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: label for label, name in enumerate(classes)}
    return model  # type: ignore[no-any-return]


def _in_order_(model: nn.Module, classes: list[str], data: Dataset) -> list[str]:
    """Put the rows of a kept head in the order of the data's classes, and return the names of these.

    Labels that are numbers are the model's: its own names stay.
    """
    known = class_names(model)
    if known is None or classes == list(map(str, range(len(classes)))):
        return classes if known is None else list(known)
    keys, wanted = list(map(alike, known)), list(map(alike, classes))
    if keys == wanted or set(keys) != set(wanted) or len(set(keys)) < len(keys):
        return classes
    try:
        layer = head_of(model, probe(model, data)).layer
    except NoHeadError:
        return classes
    order = [keys.index(name) for name in wanted]
    with torch.no_grad():
        for parameter in layer.parameters():  # (classes, features) and (classes,)
            parameter.copy_(parameter[order])
    return classes


_PRETRAINED = {
    "images": _image_classifier,
    "text": _text_classifier,
    "conversations": _language_model,
    "image-text": _image_text_model,
}


def train_victim(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    arithmetic: Arithmetic,
    adaptive: bool,
    loss: Loss = cross_entropy,
    gradients: Gradients | None = None,
    also: Sequence[tuple[nn.Module, float]] = (),
    change: Change | None = None,
    after_step: Callable[[], None] | None = None,
    progress: Progress = silent,
    description: str = "training the victim",
) -> nn.Module:
    """Train a classifier by the recipe of the victims, in place: those of its parameters that require gradients.

    As a rule SGD with Nesterov momentum 0.9 and weight decay 5e-4, one cycle up to the learning rate and down to zero:
    short enough for two cores, and the low end of the cycle lets a trigger at a low poison rate implant. If `adaptive`,
    for texts and for Vision Transformers from random weights, which SGD hardly moves: AdamW with weight decay 0.01, a
    tenth of the steps up to the learning rate and the rest linearly down to zero.

    Args:
        model: a model with random or pre-trained weights.
        data: training data, possibly poisoned.
        epochs: passes over the data, at least 1.
        learning_rate: peak of the cycle.
        batch_size: examples per step.
        seed: seed of shuffling and augmentation.
        arithmetic: device, precision, layout.
        adaptive: AdamW instead of SGD.
        loss: loss to minimise.
        gradients: see `descend`.
        also: further modules on the device, which are trained with it, each with the peak of its own cycle.
        change: function that changes each batch before the forward pass.
        after_step: function that is called after each step, without gradients.
        progress: progress of the training.
        description: description of the training, for the progress.
    """
    arithmetic.place(model)
    parameters: list[dict[str, Any]] = [
        {"params": [each for each in module.parameters() if each.requires_grad], "lr": peak}
        for module, peak in ((model, learning_rate), *also)
    ]
    steps = max(2, epochs * sum(1 for _ in range(0, len(data), batch_size)))
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    if adaptive:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
        )
    else:
        optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in parameters], total_steps=steps
        )
    descend(
        model,
        data.to(arithmetic.device),
        optimizer,
        schedule,
        epochs=epochs,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
        arithmetic=arithmetic,
        loss=loss,
        gradients=gradients,
        change=change,
        after_step=after_step,
        each="step",
        progress=progress,
        description=description,
    )
    return relayout_(model, torch.contiguous_format).eval()
