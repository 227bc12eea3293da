"""`Run`: the randomness, arithmetic and tools that a method works with."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset
from unbackdoor._data.overlap import split_apart
from unbackdoor._errors import SENTENCE, NoHeadError, UnbackdoorError, printable
from unbackdoor._models import calling
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.perplexity import Perplexity
from unbackdoor._models.perturbation import perturbed_logits
from unbackdoor._progress import Progress, silent
from unbackdoor._tasks.classification import CLASSIFICATION
from unbackdoor._tasks.proportion import Proportion, proportion_of
from unbackdoor._tasks.task import Task
from unbackdoor._training.descent import Gradients, Loss, descend
from unbackdoor._training.recipe import RECIPES, STEPS, Recipe

logger = logging.getLogger("unbackdoor")

# With few images, the default batch size makes few steps, and most of a backdoor may stay (docs/results/auto.md).
FEW = 100  # steps in all; 2,500 images in ten passes, the setting of FST's paper, are 200
SMALLEST_BATCH = 8  # BatchNorm needs some


def without_head(model: nn.Module, owner: str) -> NoHeadError:
    """Returns the error of a method (`owner`) that needs the last linear layer of a model which has none."""
    return NoHeadError(
        f"{type(model).__name__} has no final linear layer that makes its logits, which {owner} needs. "
        "Name one with `head`, end the model in an nn.Linear, or take fine-tuning."
    )


@dataclass
class Run:
    """The tools of a method, besides its model and its clean data.

    Args:
        generator: the source of all randomness, on the CPU.
        arithmetic: device, precision, layout.
        head_name: name of the last linear layer; empty if there is none.
        modality: modality of the clean examples: `images`, `text` or `conversations`.
        task: task of the model.
        progress: shows the state of the work.
        base: the pre-trained model that the suspect came from, for methods that need it.
        proxy: another model for the same task, for methods that need it.
        reference: a language model that rates texts, for guards that need it.
        adapter: of a suspect that is a LoRA adapter, the change of each layer as two factors, the first of them with
            the scale; see `unbackdoor._training.lora.factors`. Empty for other suspects.
        unlabelled: examples that the user has besides the clean ones, without labels (each is -1); some may carry a
            trigger.
        shared: what the detectors of an audit found that others of them need as well; they all search one model.
        examples_seen: counted by `tune`.
        held_out: the number of clean examples that a selection held out.
        unseen: held-out examples that were not tuned on later; None if there are none.
        cross_validated: what a model that was not tuned on it makes of each clean example, (n,), as `Task.outcomes`
            returns it; None without cross-validation.
        choice: what a method decided that chooses among others, for the record; None for all others.
        failure: why a method's result is the suspect as it was, or did not pass the tests of the method; None if
            neither is so.
        speaking: name of the method that another one runs just now; empty for the method that the user chose.
        notes: sentences on the method's findings, for the record; see `note`.
        warnings: see `warn`.
    """

    generator: torch.Generator
    arithmetic: Arithmetic
    head_name: str
    modality: str = "images"
    task: Task = CLASSIFICATION
    progress: Progress = silent
    base: nn.Module | None = None
    proxy: nn.Module | None = None
    reference: Perplexity | None = None
    adapter: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    unlabelled: Dataset | None = None
    shared: list[object] = field(default_factory=list)
    examples_seen: int = 0
    held_out: int = 0
    unseen: Dataset | None = None
    cross_validated: Tensor | None = None
    choice: dict[str, Any] | None = None
    failure: str | None = None
    speaking: str = ""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        """The default optimizer, learning rate and batch size for this modality."""
        return RECIPES[self.modality]

    def setting(self, method: object, field: str) -> Any:
        """Returns a hyper-parameter; if the user left it at None, its default for the modality of the clean examples.

        A method declares such defaults as a class variable, `defaults`. `learning_rate` and `batch_size` may be left
        out there: they default to the recipe's.

        Args:
            method: a purifier.
            field: name of its field.
        """
        chosen = getattr(method, field)
        if chosen is not None:
            return chosen
        declared = getattr(method, "defaults", {}).get(self.modality, {})
        return declared[field] if field in declared else getattr(self.recipe, field)

    def smaller(self, batch_size: int, count: int) -> int:
        """Returns a batch size in which a pass over `count` examples has as many steps as `STEPS` asks for.

        It is at least 8, as BatchNorm needs some examples, and at most the given size.
        """
        steps = STEPS.get(self.modality)
        return batch_size if steps is None else min(batch_size, max(SMALLEST_BATCH, count // steps))

    @property
    def seed(self) -> int:
        """The seed of the generator, for results that must be equal outside of this run."""
        return self.generator.initial_seed()

    def head(self, model: nn.Module) -> nn.Linear:
        """Returns the last linear layer of a model with the suspect's structure.

        Raises:
            UnbackdoorError: no linear layer makes its logits.
        """
        if not self.head_name:
            raise without_head(model, "this method")
        layer = model.get_submodule(self.head_name)
        assert isinstance(layer, nn.Linear)
        return layer

    def classes(self, model: nn.Module, data: Dataset) -> int:
        """Returns the number of a model's classes: that of its head, or by running it if it has none."""
        return self.head(model).out_features if self.head_name else calling.class_count(model, data)

    def note(self, text: str) -> None:
        """Report a finding to the user (a threshold, the words that were reset), and keep it for the record."""
        self.notes.append(printable(self._told(text), SENTENCE))
        logger.info("%s", self.notes[-1])

    def warn(self, text: str) -> None:
        """Warn the user, once, and keep the sentence for the record."""
        self.warnings.append(printable(self._told(text), SENTENCE))
        logger.warning("%s", self.warnings[-1])

    @contextmanager
    def of_another(self, method: str) -> Iterator[None]:
        """What is said in the block is of a method that the chosen one runs, whose options the user does not have."""
        before, self.speaking = self.speaking, method
        try:
            yield
        finally:
            self.speaking = before

    def _told(self, text: str) -> str:
        """A sentence; if it names fields of a method that another one runs, with its name, and not as options."""
        return f"{self.speaking}: {text.replace('`', '')}" if self.speaking and "`" in text else text

    def scores(self, model: nn.Module, inputs: calling.Inputs, perturbation: Tensor | None = None) -> Tensor:
        """Returns class scores (batch, classes) in the run's arithmetic, float32 or better; they pass gradients on.

        Args:
            model: a model of the suspect's kind.
            inputs: inputs of a batch.
            perturbation: see `perturbed_logits`.
        """
        laid = self.arithmetic.lay(inputs)
        with self.arithmetic.autocast():
            scores = (
                calling.logits(model, laid) if perturbation is None else perturbed_logits(model, laid, perturbation)
            )
        return scores if scores.dtype == torch.float64 else scores.float()

    def tune(
        self,
        model: nn.Module,
        clean: Dataset,
        *,
        epochs: int,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        optimizer: Literal["sgd", "adamw"] | torch.optim.Optimizer | None = None,
        loss: Loss | None = None,
        gradients: Gradients | None = None,
        before_epoch: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
        description: str = "tuning",
    ) -> None:
        """Tune the parameters that require gradients by the recipe of the kind of data, in train mode.

        Args:
            model: the method's model.
            clean: the examples to tune on.
            epochs: passes over them.
            learning_rate: None uses the recipe's.
            batch_size: None uses the recipe's.
            optimizer: an optimizer with its schedule, see `Recipe`; None uses the recipe's. One that a method passes
                keeps its own learning rate.
            loss: loss to minimise; None uses the task's.
            gradients: replaces the forward and backward pass of the loss, for methods whose step needs more than one of
                each; fills the gradients of the parameters for a batch.
            before_epoch: function that is called before each pass.
            after_step: function that is called after each step, without gradients.
            description: description for the progress.
        """
        if self.unseen is not None and positions(self.unseen, clean) is not None:
            self.unseen = None
        rate = self.recipe.learning_rate if learning_rate is None else learning_rate
        size = self.recipe.batch_size if batch_size is None else batch_size
        if batch_size is None:
            self._tell_few_steps(len(clean), size, epochs)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        descent: torch.optim.Optimizer
        schedule: torch.optim.lr_scheduler.LRScheduler
        if isinstance(optimizer, torch.optim.Optimizer):
            descent, each = optimizer, "epoch"
            schedule = torch.optim.lr_scheduler.ConstantLR(descent, factor=1.0)
        elif (optimizer or self.recipe.optimizer) == "sgd":
            descent, each = torch.optim.SGD(parameters, lr=rate, momentum=0.9), "epoch"
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, T_max=epochs)
        else:
            descent, each = torch.optim.AdamW(parameters, lr=rate, fused=True), "step"
            steps = epochs * math.ceil(len(clean) / size)
            schedule = torch.optim.lr_scheduler.LinearLR(descent, 1.0, 0.0, total_iters=steps)
        self.examples_seen += descend(
            model,
            clean,
            descent,
            schedule,
            epochs=epochs,
            batch_size=size,
            generator=self.generator,
            arithmetic=self.arithmetic,
            loss=self.task.loss if loss is None else loss,
            gradients=gradients,
            before_epoch=before_epoch,
            after_step=after_step,
            each=each,
            progress=self.progress,
            description=description,
        )
        self._tell_still_weights(model, descent)

    def _tell_few_steps(self, count: int, size: int, epochs: int) -> None:
        """Note, once, that `count` examples in batches of the usual size make fewer steps than methods need."""
        steps, advised = epochs * math.ceil(count / size), self.smaller(size, count)
        text = "batches of the usual size make few steps"
        if steps < FEW and advised < size and not any(text in note for note in self.notes):
            self.note(
                f"{text}: {count:,} examples in batches of {size} are {steps} steps, and a backdoor may outlast them. "
                f"Try `batch_size={advised}` as well."
            )

    def _tell_still_weights(self, model: nn.Module, descent: torch.optim.Optimizer) -> None:
        """Warn, once, if most of the weights that were to be tuned got no gradient in the last step."""
        tuned = {id(each): each for group in descent.param_groups for each in group["params"]}
        still = [name for name, each in model.named_parameters() if id(each) in tuned and each.grad is None]
        numbers = sum(tuned[id(model.get_parameter(name))].numel() for name in still)
        text = f"{type(model).__name__} passes no gradient to most of its weights"
        if 2 * numbers > sum(each.numel() for each in tuned.values()) and not any(
            text in each for each in self.warnings
        ):
            self.warn(
                f"{text} ({still[0]}, say), so they stay as they are, and a backdoor with them. Take torch.no_grad and "
                "detach out of its forward."
            )

    def hold_out(self, clean: Dataset, share: float = 0.2) -> tuple[Dataset, Dataset]:
        """Split the clean examples for a method that selects something: some to tune on, some to select with.

        The draw is stratified, and equal inputs stay together; `held_out` of the record counts the second part.

        Args:
            clean: all clean examples.
            share: the size of the second part, in (0, 1).

        Raises:
            UnbackdoorError: there are fewer than 2 examples.
        """
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        kept = min(max(round((1 - share) * len(clean)), 1), len(clean) - 1)
        tuned, held = split_apart(clean, kept, seed=seed)
        self.held_out = max(self.held_out, len(held))
        self.unseen = None if self.examples_seen else held
        return tuned, held

    def needed(self, what: Literal["base", "proxy"], method: object) -> nn.Module:
        """Returns the base or the proxy model, for a method that needs it.

        Raises:
            UnbackdoorError: the model was not given.
        """
        model = self.base if what == "base" else self.proxy
        if model is None:
            means = (
                "the pre-trained model that the suspect came from" if what == "base" else "a model for the same task"
            )
            raise UnbackdoorError(f"{type(method).__name__} needs `{what}`: {means}.")
        return model

    def quality(self, model: nn.Module, data: Dataset) -> float:
        """Returns how good a model is on examples: the mean of `Task.quality` over them."""
        rows = self.task.quality(data, self.task.outcomes(model, data, self.arithmetic))
        return float(rows.double().sum()) / len(rows)

    def accuracy(self, model: nn.Module, data: Dataset) -> Proportion:
        """Returns the share of examples that a model classifies as labelled."""
        return proportion_of(self.task.outcomes(model, data, self.arithmetic))


def positions(part: Dataset, whole: Dataset) -> Tensor | None:
    """Returns the positions of a part's examples in the whole, (n,); None if one of them is not in it."""
    rows = torch.arange(len(whole)) if whole.rows is None else whole.rows.cpu()
    position = {row: place for place, row in enumerate(rows.tolist())}
    places = [position.get(row) for row in ([] if part.rows is None else part.rows.tolist())]
    return None if None in places or not places else torch.tensor(places)
