"""`purify`: the one place that copies, seeds, checks, times and records. Methods do none of it."""

import copy
import logging
import math
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unbackdoor import _models
from unbackdoor._checkpoints import check_finite
from unbackdoor._data import Dataset, check_labels
from unbackdoor._errors import UnbackdoorError
from unbackdoor._evaluate import Proportion, predict
from unbackdoor._precision import Arithmetic, Precision, choose, description, relayout_
from unbackdoor._registry import name_of, to_json
from unbackdoor._train import Loss, Progress, bar, cross_entropy, descend, silent
from unbackdoor._values import check_seed
from unbackdoor.purifiers import REGISTRY

logger = logging.getLogger("unbackdoor")


class Method(Protocol):
    """A purifier: a frozen value that can be called. There is nothing to inherit from."""

    def __call__(self, model: nn.Module, clean: Dataset, run: "Run") -> nn.Module:
        """Change the model, which is the method's own copy, and give it back."""


@dataclass
class Run:
    """What a purification has at hand beside model and clean data.

    Args:
        generator: the source of all randomness, on the CPU.
        arithmetic: device, precision, layout.
        head_name: of the last linear layer.
        progress: shows how far it is.
        base: the pre-trained model that the suspect came from, for methods that need it.
        proxy: another model for the same task, for methods that need it.
        examples_seen: counted by `tune`.
        held_out: how many clean examples a selection held back.
    """

    generator: torch.Generator
    arithmetic: Arithmetic
    head_name: str
    progress: Progress = silent
    base: nn.Module | None = None
    proxy: nn.Module | None = None
    examples_seen: int = 0
    held_out: int = 0
    warnings: list[str] = field(default_factory=list)

    def head(self, model: nn.Module) -> nn.Linear:
        """The last linear layer of a model of the suspect's shape."""
        layer = model.get_submodule(self.head_name)
        assert isinstance(layer, nn.Linear)
        return layer

    def warn(self, text: str) -> None:
        """Say something that the user should know, once, and keep it for the record."""
        self.warnings.append(text)
        logger.warning("%s", text)

    def tune(
        self,
        model: nn.Module,
        clean: Dataset,
        *,
        epochs: int,
        learning_rate: float,
        batch_size: int,
        loss: Loss = cross_entropy,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """Tune the parameters that require gradients: SGD, momentum 0.9, no decay, cosine per epoch, train mode."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
        self.examples_seen += descend(
            model,
            clean,
            optimizer,
            schedule,
            epochs=epochs,
            batch_size=batch_size,
            generator=self.generator,
            arithmetic=self.arithmetic,
            loss=loss,
            after_step=after_step,
            progress=self.progress,
        )


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
    clean: Dataset,
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

    The given model and the global random state are left as they were.

    Args:
        model: any classifier whose last layer is linear.
        clean: labelled examples without trigger.
        method: of `unbackdoor.purifiers`, or any callable like them.
        seed: of everything random; on one CPU the same seed gives the same weights.
        head: name of the last linear layer, where it cannot be found by running the model.
        device: None takes a GPU where there is one.
        precision: see `unbackdoor._precision.choose`.
        base: the pre-trained model that the suspect came from.
        proxy: another model for the same task.
        progress: show a bar on stderr.

    Raises:
        UnbackdoorError: model and data do not fit the method or each other, or the result is not finite.
    """
    check_seed(seed)
    check_finite(model.state_dict(), type(model).__name__)
    training = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    unsaved = {name: buffer.dtype for name, buffer in model.named_buffers() if name not in types}
    home = _models.device_of(model)

    working = copy.deepcopy(model)
    if any(dtype in (torch.float16, torch.bfloat16) for dtype in types.values()):
        working.float()  # half precision is too coarse for small steps
    arithmetic = choose(working, device, precision)
    if len(clean) == 0:
        raise UnbackdoorError(f"{clean.name} is empty; at least one labelled clean example per class is needed.")
    found = _models.head(working, _models.probe(working, clean), head)
    classes = found.layer.out_features
    check_labels(clean, classes)

    run = Run(torch.Generator().manual_seed(seed), arithmetic, found.name, bar if progress else silent, base, proxy)
    before = _accuracy(working, clean, arithmetic)
    _check_clean(clean, classes, before, run)
    cuda = [arithmetic.device] if arithmetic.device.type == "cuda" else []
    for gpu in cuda:
        torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for parameter in working.parameters():
            parameter.requires_grad_(True)
        purified = method(arithmetic.place(working), clean.to(arithmetic.device), run)
    seconds = time.perf_counter() - start

    if not isinstance(purified, nn.Module):
        name = getattr(method, "__name__", type(method).__name__)
        raise UnbackdoorError(f"{name} must return the model, got {type(purified).__name__}. End it in return model.")
    relayout_(purified.to(home), torch.contiguous_format)
    _restore(purified, types, unsaved, training, trainable, type(method).__name__)
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
        "head": found.name,
        "clean": {
            "n": len(clean),
            "per_class": torch.bincount(clean.labels.cpu(), minlength=classes).tolist(),
            "held_out": run.held_out,
        },
        "examples_seen": run.examples_seen,
        "suspect_accuracy_on_clean": before.to_json(),
        "warnings": run.warnings,
    }
    return Purified(purified, record)


def peak_memory() -> int:
    """The most memory that this process has held resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _accuracy(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Proportion:
    hits = predict(model, data, arithmetic) == data.labels.cpu()
    return Proportion(int(hits.sum()), len(hits))


def _check_clean(clean: Dataset, classes: int, accuracy: Proportion, run: Run) -> None:
    """Refuse too few examples; warn of classes without one and of a suspect near chance."""
    if len(clean) < classes:
        raise UnbackdoorError(
            f"{clean.name} must hold at least one example for each of the {classes} classes, got {len(clean)} in all. "
            "Add clean examples."
        )
    counts = torch.bincount(clean.labels.cpu(), minlength=classes)
    absent = torch.nonzero(counts == 0).flatten().tolist()
    if absent:
        names = [clean.classes[label] if clean.classes else str(label) for label in absent[:5]]
        more = ", ..." if len(absent) > 5 else ""
        run.warn(
            f"{clean.name} has no example of {len(absent)} class(es) ({', '.join(names)}{more}): the purified model "
            "will probably lose them."
        )
    if accuracy.interval[0] <= 1 / classes:
        run.warn(
            f"the suspect is near chance on {clean.name} ({accuracy!r}): its labels, their order or the preprocessing "
            "probably do not fit the model."
        )


def _restore(
    model: nn.Module,
    types: dict[str, torch.dtype],
    unsaved: dict[str, torch.dtype],
    training: dict[str, bool],
    trainable: dict[str, bool],
    owner: str,
) -> None:
    """Give the result the suspect's types (those of its unsaved buffers, too) and modes; check keys and values."""
    state: dict[str, Tensor] = model.state_dict()
    if state.keys() != types.keys():
        odd = sorted(state.keys() ^ types.keys())
        raise UnbackdoorError(f"{owner} must keep the model's weights, but changed the keys {', '.join(odd[:3])}.")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnbackdoorError(f"{owner} left non-finite values in {name}. Lower its learning rate.")
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
