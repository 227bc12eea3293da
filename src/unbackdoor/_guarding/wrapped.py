"""A model, or a pipeline of transformers, behind a guard."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._errors import UnbackdoorError
from unbackdoor._guarding.deciding import Decision, Judged
from unbackdoor._guarding.guard import restrains
from unbackdoor._guarding.identity import check_same, model_hash, tokenizer_hash
from unbackdoor._models.arithmetic import Precision

if TYPE_CHECKING:
    from unbackdoor._guarding.fitted import FittedGuard


class Answer(NamedTuple):
    """What comes out of a guarded model for one input.

    Args:
        decision: of the guard.
        answer: class scores, (classes,), or what the pipeline returned; None for a rejected input.
    """

    decision: Decision
    answer: Any


def is_pipeline(model: object) -> bool:
    """Whether this is a pipeline of transformers: something that can be called, around a model."""
    return not isinstance(model, nn.Module) and callable(model) and isinstance(getattr(model, "model", None), nn.Module)


def check_pipeline(pipeline: Any, fitted: "FittedGuard") -> None:
    """Refuse a pipeline around another model or tokenizer than the guard was fitted to."""
    check_same("model", fitted.identity.model, model_hash(pipeline.model))
    if isinstance(fitted.encode, TextEncoder):
        given = tokenizer_hash(pipeline.tokenizer, fitted.encode.max_length)
        check_same("tokenizer", fitted.identity.tokenizer, given)


@dataclass(frozen=True, eq=False)
class Guarded:
    """A model behind a guard; `FittedGuard.wrap` returns it.

    Args:
        fitted: the guard.
        model: a module, or a pipeline of transformers.
        device: of the model; None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
    """

    fitted: "FittedGuard"
    model: Any
    device: str | None
    precision: Precision

    def __call__(self, inputs: Any, **options: Any) -> list[Answer]:
        """Decide about inputs, and answer those that are not rejected.

        Args:
            inputs: a Dataset; texts or pairs of texts; pictures as a tensor, (n, channels, height, width), uint8, or as
                a list of PIL images or paths. A single text or picture is a list of one.
            options: passed to the pipeline.

        Raises:
            UnbackdoorError: the inputs are of another kind than those of the guard.
        """
        if isinstance(inputs, list | tuple | Tensor | Dataset) and len(inputs) == 0:
            return []
        data = as_dataset(inputs, self.fitted.encode)
        piped = is_pipeline(self.model)
        module = self.model.model if piped else self.model
        with self.fitted.at_work(module, self.device, self.precision) as work:
            judged = work.judged(data, answering=not piped)
        if piped:
            return self._piped(inputs, data, judged, options)
        return [
            Answer(decision, None if decision.action == "reject" or judged.final is None else judged.final[row])
            for row, decision in enumerate(judged.decisions)
        ]

    def _piped(self, inputs: Any, data: Dataset, judged: Judged, options: dict[str, Any]) -> list[Answer]:
        """The answers of the pipeline to what passes, to changed texts, and of a restrained model."""
        answers: list[Any] = [None] * len(data)
        given = _for_pipeline(inputs, data)
        if isinstance(data.encode, TextEncoder):
            options = {"truncation": True, "max_length": data.encode.max_length, **options}
        for row, strings in judged.edited.items():
            given[row] = _of_pipeline(strings)
        restraining = restrains(self.fitted.guard)
        for action in ("pass", "clean"):
            rows = [decision.row for decision in judged.decisions if decision.action == action]
            other = restraining.restrained(self.model.model, self.fitted.learnt) if restraining else nullcontext()
            with other if action == "clean" else nullcontext():
                found = self.model([given[row] for row in rows], **options) if rows else []
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return [Answer(decision, answers[decision.row]) for decision in judged.decisions]


def as_dataset(inputs: Any, encode: Encoder) -> Dataset:
    """Returns inputs of any kind as a data set without labels.

    Raises:
        UnbackdoorError: they are of another kind than the encoder reads.
    """
    if isinstance(inputs, Dataset):
        return inputs
    name = "the inputs"
    if isinstance(encode, TextEncoder):
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, Sequence) or not all(map(_is_text, texts)):
            raise UnbackdoorError(
                f"The guard was fitted to text; it takes a list of texts or of pairs, got {type(inputs).__name__}."
            )
        strings = tuple((text,) if isinstance(text, str) else tuple(text) for text in texts)
        if len({len(each) for each in strings}) > 1:
            raise UnbackdoorError("The guard takes texts or pairs of texts, got both. Give them one after the other.")
        columns = ("text",) if not strings or len(strings[0]) == 1 else ("text_a", "text_b")
        return Dataset(items=Texts(strings, columns), labels=_none(len(strings)), encode=encode, name=name)
    if isinstance(inputs, Tensor):
        if inputs.ndim != 4 or inputs.dtype != torch.uint8:
            raise UnbackdoorError(
                "The guard takes pictures as a tensor of shape (n, channels, height, width) and type uint8, got shape "
                f"{tuple(inputs.shape)} and {str(inputs.dtype).removeprefix('torch.')}."
            )
        return Dataset(items=inputs, labels=_none(len(inputs)), encode=encode, name=name)
    pictures = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    items, encode = encode.read({"image": pictures}, name, None)
    return Dataset(items=items, labels=_none(len(items)), encode=encode, name=name)


def _is_text(given: object) -> bool:
    pair = isinstance(given, tuple) and len(given) == 2 and all(isinstance(side, str) for side in given)
    return isinstance(given, str) or pair


def _none(count: int) -> Tensor:
    return torch.full((count,), -1)


def _for_pipeline(inputs: Any, data: Dataset) -> list[Any]:
    """The inputs one by one, as a pipeline takes them."""
    if isinstance(data.items, Texts):
        return [_of_pipeline(strings) for strings in data.items.strings]
    if isinstance(inputs, Dataset | Tensor):
        from PIL import Image

        pixels = [picture.permute(1, 2, 0).squeeze(-1).cpu().numpy() for picture in data.pixels]
        return [Image.fromarray(picture).convert("RGB") for picture in pixels]
    return list(inputs) if isinstance(inputs, list | tuple) else [inputs]


def _of_pipeline(strings: tuple[str, ...]) -> Any:
    return strings[0] if len(strings) == 1 else {"text": strings[0], "text_pair": strings[1]}
