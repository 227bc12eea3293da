"""`purify`: the one place that copies, seeds, checks, times and records. Methods do none of it."""

import copy
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unbackdoor._artifacts.machine import peak_memory
from unbackdoor._data.dataset import Dataset, check_labels, in_order_of, tell_order
from unbackdoor._errors import SENTENCE, UnbackdoorError, printable
from unbackdoor._evaluation.damage import ALLOWED, unusable
from unbackdoor._evaluation.score import Proportion, chance_doubt, hits
from unbackdoor._models import calling
from unbackdoor._models.arithmetic import Arithmetic, Precision, choose, description, relayout_
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._progress import Progress, bar, silent
from unbackdoor._registry.entries import name_of, steps_of, to_json
from unbackdoor._registry.purifiers import REGISTRY
from unbackdoor._training.descent import Gradients, Loss, cross_entropy, descend
from unbackdoor._value import check_seed

logger = logging.getLogger("unbackdoor")


class Method(Protocol):
    """A purifier: a frozen value that can be called. There is nothing to inherit from."""

    def __call__(self, model: nn.Module, clean: Dataset, run: "Run") -> nn.Module:
        """Change the model, which is the method's own copy, and give it back."""


def needs_clean(method: Method) -> bool:
    """Whether a method uses clean examples; one that does not says `needs_clean = False`."""
    return bool(getattr(method, "needs_clean", True))


def asking(method: Method) -> str:
    """The class that uses clean examples: a method's own, or of a composition the first such step's."""
    return next((type(step).__name__ for step in steps_of(method) if needs_clean(step)), type(method).__name__)


def owner_of(method: Method) -> str:
    """What messages name: a method's class, of a composition those of its steps (`EPUR+FST`), a function's name."""
    return "+".join(getattr(step, "__name__", type(step).__name__) for step in steps_of(method))


class Recipe(NamedTuple):
    """How a network of its kind is tuned, where a method's learning rate and batch size are left open.

    Args:
        optimizer: SGD with momentum 0.9, no weight decay, cosine per epoch, for images; AdamW with its usual decay of
            0.01, linear to 0 per step, for texts.
        learning_rate: at the start.
        batch_size: examples per step.
    """

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    batch_size: int


RECIPES = {"images": Recipe("sgd", 0.01, 128), "text": Recipe("adamw", 5e-5, 16)}


@dataclass
class Run:
    """What a purification has at hand beside model and clean data.

    Args:
        generator: the source of all randomness, on the CPU.
        arithmetic: device, precision, layout.
        head_name: of the last linear layer.
        recipe: how networks of this kind are tuned.
        progress: shows how far it is.
        base: the pre-trained model that the suspect came from, for methods that need it.
        proxy: another model for the same task, for methods that need it.
        examples_seen: counted by `tune`.
        held_out: how many clean examples a selection held back.
        unseen: those of them that nothing was tuned on since; None where there are none.
        cross_validated: which clean examples the method's procedure classifies as labelled where it has not seen them,
            (n,), bool; None where nothing was cross-validated.
        notes: what a method found out, for the record; see `note`.
        warnings: see `warn`.
    """

    generator: torch.Generator
    arithmetic: Arithmetic
    head_name: str
    recipe: Recipe = RECIPES["images"]
    progress: Progress = silent
    base: nn.Module | None = None
    proxy: nn.Module | None = None
    examples_seen: int = 0
    held_out: int = 0
    unseen: Dataset | None = None
    cross_validated: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """What the generator started from, for what must come out the same outside of this run, too."""
        return self.generator.initial_seed()

    def head(self, model: nn.Module) -> nn.Linear:
        """The last linear layer of a model of the suspect's shape."""
        layer = model.get_submodule(self.head_name)
        assert isinstance(layer, nn.Linear)
        return layer

    def note(self, text: str) -> None:
        """Tell the user what was found (a threshold, the words that were reset), and keep it for the record."""
        self.notes.append(printable(text, SENTENCE))
        logger.info("%s", self.notes[-1])

    def warn(self, text: str) -> None:
        """Say something that the user should know, once, and keep it for the record."""
        self.warnings.append(printable(text, SENTENCE))
        logger.warning("%s", self.warnings[-1])

    def scores(self, model: nn.Module, inputs: calling.Inputs, perturbation: Tensor | None = None) -> Tensor:
        """Class scores (batch, classes) in the run's arithmetic, float32 or better, which gradients flow through.

        Args:
            model: of the suspect's kind.
            inputs: of a batch.
            perturbation: see `perturbed_logits`.
        """
        laid = self.arithmetic.lay(inputs)
        with self.arithmetic.autocast():
            if perturbation is None:
                made = calling.logits(model, laid)
            else:
                made = calling.perturbed_logits(model, laid, perturbation)
        return made if made.dtype == torch.float64 else made.float()

    def tune(
        self,
        model: nn.Module,
        clean: Dataset,
        *,
        epochs: int,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        optimizer: Literal["sgd", "adamw"] | torch.optim.Optimizer | None = None,
        loss: Loss = cross_entropy,
        gradients: Gradients | None = None,
        before_epoch: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
        description: str = "tuning",
    ) -> None:
        """Tune the parameters that require gradients by the recipe of the kind of data, in train mode.

        Args:
            model: the method's own.
            clean: what to tune on.
            epochs: passes over it.
            learning_rate: None takes the recipe's.
            batch_size: None takes the recipe's.
            optimizer: with its schedule, see `Recipe`; None takes the recipe's. A method's own is taken as it is, and
                keeps its learning rate.
            loss: what to minimise.
            gradients: in place of one forward and one backward pass of the loss, for methods whose step takes more:
                fills the gradients of the parameters for a batch.
            before_epoch: called before each pass.
            after_step: called after each step, without gradients.
            description: what the progress calls it.
        """
        if self.unseen is not None and _places(self.unseen, clean) is not None:
            self.unseen = None
        rate = self.recipe.learning_rate if learning_rate is None else learning_rate
        size = self.recipe.batch_size if batch_size is None else batch_size
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
            loss=loss,
            gradients=gradients,
            before_epoch=before_epoch,
            after_step=after_step,
            each=each,
            progress=self.progress,
            description=description,
        )

    def hold_out(self, clean: Dataset, share: float = 0.2) -> tuple[Dataset, Dataset]:
        """Part the clean examples for a method that selects something: to tune on, and to select with.

        The draw is stratified; `held_out` of the record counts the second part.

        Args:
            clean: all of them.
            share: of the second part, in (0, 1).

        Raises:
            UnbackdoorError: fewer than 2 examples.
        """
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        kept = min(max(round((1 - share) * len(clean)), 1), len(clean) - 1)
        tuned, held = clean.split(kept, seed=seed)
        self.held_out = max(self.held_out, len(held))
        self.unseen = None if self.examples_seen else held
        return tuned, held

    def needed(self, what: Literal["base", "proxy"], method: object) -> nn.Module:
        """The base or the proxy model, for a method that cannot do without.

        Raises:
            UnbackdoorError: it was not given.
        """
        model = self.base if what == "base" else self.proxy
        if model is None:
            means = (
                "the pre-trained model that the suspect came from" if what == "base" else "a model for the same task"
            )
            raise UnbackdoorError(f"{type(method).__name__} needs --{what} ({what}= in Python): {means}.")
        return model

    def accuracy(self, model: nn.Module, data: Dataset) -> Proportion:
        """The share of examples that a model classifies as labelled."""
        return _accuracy(model, data, self.arithmetic)


def reinitialise_(layer: nn.Linear, generator: torch.Generator) -> None:
    """Draw weight and bias anew from U(-s, s), s = 1 / sqrt(in_features), in place."""
    bound = 1 / math.sqrt(layer.in_features)
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_((2 * drawn - 1) * bound)


class Purified(NamedTuple):
    """The purified model, and how it came about (the content of `record.json` but for the scores)."""

    model: nn.Module
    record: dict[str, Any]


def purify(
    model: nn.Module,
    clean: Dataset | None,
    method: Method,
    *,
    seed: int = 0,
    head: str | None = None,
    device: str | None = None,
    precision: Precision = "auto",
    base: nn.Module | None = None,
    proxy: nn.Module | None = None,
    progress: bool = False,
) -> Purified:
    """Remove a backdoor: a suspect and a few clean examples in, the same kind of model out.

    The given model and the global random state are left as they were. A model that lost significantly more than 10
    points of accuracy on clean examples comes back all the same: then `record["usable"]` is False, and the first of
    `record["warnings"]` says why.

    Args:
        model: any classifier whose last layer is linear.
        clean: labelled examples without trigger; None for a method that uses none.
        method: of `unbackdoor.purifiers`, or any callable like them.
        seed: of everything random; on one CPU the same seed gives the same weights.
        head: name of the last linear layer, where it cannot be found by running the model.
        device: None takes a GPU where there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        base: the pre-trained model that the suspect came from.
        proxy: another model for the same task.
        progress: show a bar on stderr.

    Raises:
        UnbackdoorError: model and data do not fit the method or each other, or the result is not finite.
    """
    check_seed(seed)
    if isinstance(method, type):
        raise UnbackdoorError(
            f"purify takes a method's value, got the class {method.__name__}. Write {method.__name__}()."
        )
    if not callable(method):
        raise UnbackdoorError(f"purify takes a method's value, got {method!r}. Take one of unbackdoor.purifiers.")
    if clean is not None and not isinstance(clean, Dataset):
        raise UnbackdoorError(
            f"purify takes clean as a Dataset, got {type(clean).__name__}. Load it with unbackdoor.Dataset.load."
        )
    calling.check_modules("purify", model=model, base=base, proxy=proxy)
    check_finite(model.state_dict(), type(model).__name__)
    training = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    unsaved = {name: buffer.dtype for name, buffer in model.named_buffers() if name not in types}
    home = calling.device_of(model)

    working = copy.deepcopy(model)
    if any(dtype in (torch.float16, torch.bfloat16) for dtype in types.values()):
        working.float()  # half precision is too coarse for small steps
    arithmetic = choose(working, device, precision)
    run = Run(
        generator=torch.Generator().manual_seed(seed),
        arithmetic=arithmetic,
        head_name=head or "",
        progress=bar if progress else silent,
        base=base,
        proxy=proxy,
    )
    names = ("clean", "recipe", "suspect_accuracy_on_clean", "purified_accuracy_on_clean", "usable")
    facts: dict[str, Any] = dict.fromkeys(names)
    before = torch.empty(0)
    if clean is not None:
        clean = in_order_of(clean, calling.class_names(model))
        before = _look(working, clean, head, run, facts)
    if clean is None and needs_clean(method):
        raise UnbackdoorError(f"{asking(method)} needs clean examples, got none.")
    cuda = [arithmetic.device] if arithmetic.device.type == "cuda" else []
    for gpu in cuda:
        torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for parameter in working.parameters():
            parameter.requires_grad_(True)
        examples: Any = clean if clean is None else clean.to(arithmetic.device)
        purified = applied(method, arithmetic.place(working), examples, run)
    seconds = time.perf_counter() - start

    if clean is not None:
        _look_again(purified, clean, method, before, run, facts)
    relayout_(purified.to(home), torch.contiguous_format)
    _restore(purified, types, unsaved, training, trainable, owner_of(method))
    record = {
        "method": {**to_json(method, REGISTRY), "repr": repr(method)},
        "seed": seed,
        "versions": {
            "unbackdoor": version("unbackdoor"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": description(arithmetic),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(cuda[0]) if cuda else peak_memory(),
        "head": run.head_name or None,
        **facts,
        "examples_seen": run.examples_seen,
        "notes": run.notes,
        "warnings": run.warnings,
    }
    if record["clean"] is not None:
        record["clean"]["held_out"] = run.held_out
    return Purified(purified, record)


def applied(method: Method, model: nn.Module, clean: Dataset, run: Run) -> nn.Module:
    """What a method makes of a model, in place, be it alone or as a step of several.

    Raises:
        UnbackdoorError: it is no model, or has values that are not finite.
    """
    run.unseen = run.cross_validated = None  # what one step held out, the next one sees
    purified = method(model, clean, run)
    if not isinstance(purified, nn.Module):
        raise UnbackdoorError(
            f"{owner_of(method)} must return the model, got {type(purified).__name__}. End it in return model."
        )
    for name, tensor in purified.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnbackdoorError(f"{owner_of(method)} left non-finite values in {name}. Lower its learning rate.")
    return purified


def judged(
    purified: Purified, suspect: nn.Module, test: Dataset, method: Method, arithmetic: Arithmetic
) -> dict[str, Any]:
    """What test examples say of a result whose method took no clean ones: `usable` and `warnings` of its record."""
    before, after = (hits(model, test, arithmetic) for model in (suspect, purified.model))
    found = unusable(before, after, "which are scored", method)
    return {"usable": found is None, "warnings": [*([] if found is None else [found]), *purified.record["warnings"]]}


def _look(model: nn.Module, clean: Dataset, head: str | None, run: Run, facts: dict[str, Any]) -> Tensor:
    """Check that model and clean examples fit each other, tell `run` the head and the recipe, and record both.

    Returns:
        which examples the model classifies as labelled, (n,), bool.
    """
    if len(clean) == 0:
        raise UnbackdoorError(f"{clean.name} is empty; at least one labelled clean example per class is needed.")
    found = calling.head(model, calling.probe(model, clean), head)
    run.head_name, run.recipe = found.name, RECIPES[clean.modality]
    classes = found.layer.out_features
    check_labels(clean, classes)
    right = hits(model, clean, run.arithmetic)
    before = Proportion(int(right.sum()), len(right))
    _check_clean(clean, classes, before, run)
    tell_order(clean, calling.class_names(model), classes, run.warn)
    facts |= {
        "clean": {
            "n": len(clean),
            "per_class": torch.bincount(clean.labels.cpu(), minlength=classes).tolist(),
            "augment": asdict(clean.augment),
        },
        "recipe": run.recipe._asdict(),
        "suspect_accuracy_on_clean": before.to_json(),
    }
    return right


def _look_again(
    model: nn.Module, clean: Dataset, method: Method, before: Tensor, run: Run, facts: dict[str, Any]
) -> None:
    """Record the result's accuracy on the examples that it was made with, and whether it is of use after all."""
    after = hits(model, clean, run.arithmetic)
    facts["purified_accuracy_on_clean"] = Proportion(int(after.sum()), len(after)).to_json()
    which = "which it was made with"
    held = None if run.unseen is None else _places(run.unseen, clean)
    if held is not None:
        before, after, which = before[held], after[held], "which were held out"
    elif run.cross_validated is not None and len(run.cross_validated) == len(before):
        after, which = run.cross_validated, "which were left out in their turn"
    found = unusable(before, after, which, method)
    facts["usable"] = found is None
    if found is not None:
        run.warnings.insert(0, found)
        logger.warning("%s", found, extra={"first_line": True})
        return
    lost = float(before.double().mean() - after.double().mean())
    if lost > ALLOWED:
        run.warn(
            f"the purified model answers {len(before):,} clean examples, {which}, {100 * lost:.1f} points worse than "
            f"the suspect; they are too few to tell whether more than {100 * ALLOWED:.0f} points are lost. Score it on "
            "others by --data, or give more."
        )


def _places(part: Dataset, whole: Dataset) -> Tensor | None:
    """Where the examples of a part stand in the whole, (n,); None where one of them is not there."""
    rows = torch.arange(len(whole)) if whole.rows is None else whole.rows.cpu()
    places = {row: place for place, row in enumerate(rows.tolist())}
    found = [places.get(row) for row in ([] if part.rows is None else part.rows.tolist())]
    return None if None in found or not found else torch.tensor(found)


def _accuracy(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Proportion:
    right = hits(model, data, arithmetic)
    return Proportion(int(right.sum()), len(right))


def _check_clean(clean: Dataset, classes: int, accuracy: Proportion, run: Run) -> None:
    """Refuse too few examples; warn of classes without one and of a suspect near chance."""
    if len(clean) < classes:
        raise UnbackdoorError(
            f"{clean.name} must hold at least one example for each of the {classes} classes, got {len(clean)} in all. "
            "Add clean examples."
        )
    counts = torch.bincount(clean.labels.cpu(), minlength=classes)
    absent = torch.nonzero(counts == 0).flatten().tolist()
    if len(absent) == classes - 1:
        only = int(counts.argmax())
        raise UnbackdoorError(
            f"{clean.name} holds one class only ({clean.class_name(only)}): whatever is tuned "
            f"on it learns to answer nothing else. Add clean examples of the other class{'es' * (classes > 2)}."
        )
    if absent:
        known = dict(enumerate(clean.classes or ()))
        names = [known.get(label, str(label)) for label in absent[:5]]
        more = ", ..." if len(absent) > 5 else ""
        run.warn(
            f"{clean.name} has no example of {len(absent)} class(es) ({', '.join(names)}{more}): the purified model "
            "will probably lose them."
        )
    doubt = chance_doubt("the suspect", accuracy, classes, clean.name)
    if doubt is not None:
        run.warn(doubt)


def _restore(
    model: nn.Module,
    types: dict[str, torch.dtype],
    unsaved: dict[str, torch.dtype],
    training: dict[str, bool],
    trainable: dict[str, bool],
    owner: str,
) -> None:
    """Give the result the suspect's types (those of its unsaved buffers, too) and modes; check keys and range."""
    state: dict[str, Tensor] = model.state_dict()
    if state.keys() != types.keys():
        odd = sorted(state.keys() ^ types.keys())
        raise UnbackdoorError(f"{owner} must keep the model's weights, but changed the keys {', '.join(odd[:3])}.")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(types[name])).all():
            raise UnbackdoorError(
                f"{owner} left values in {name} that are too large for the model's {str(types[name])[6:]}. Take a base "
                "of that type, or give the model in float32."
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(types[name])
            parameter.requires_grad_(trainable[name])
            parameter.grad = None
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to((types | unsaved)[name])
    for name, module in model.named_modules():
        module.training = training[name]


def method_name(method: Method) -> str:
    """The command-line name of a method."""
    return name_of(method, REGISTRY)
