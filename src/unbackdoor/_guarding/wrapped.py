"""A model, or a pipeline of transformers, behind a guard."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.conversation_rows import conversations_of
from unbackdoor._data.conversations import Conversation, Conversations
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.decoding import decode_cell
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.texts import TextEncoder, Texts
from unbackdoor._errors import UnbackdoorError
from unbackdoor._guarding.deciding import Decision, Judged
from unbackdoor._guarding.guard import Guard, restrains
from unbackdoor._guarding.identity import (
    Identity,
    check_model,
    check_same,
    template_hash,
    tokenizer_hash,
    weights_mark,
)
from unbackdoor._guarding.turns import turn
from unbackdoor._guarding.work import Work
from unbackdoor._inputs import is_unicode
from unbackdoor._models.arithmetic import Precision
from unbackdoor._purification.run import Run
from unbackdoor._tasks.generation import Generation

_PIPELINES: dict[type, str] = {
    TextEncoder: "TextClassificationPipeline",
    ConversationEncoder: "TextGenerationPipeline",
    ImageEncoder: "ImageClassificationPipeline",
}
"""The pipelines of transformers that give their model what they are given, by the encoder of the model."""


class Fitted(Protocol):
    """The members of a `FittedGuard` that a guarded model needs."""

    @property
    def guard(self) -> Guard:
        """The guard with its settings."""

    @property
    def learnt(self) -> dict[str, Tensor]:
        """Its arrays, on the CPU."""

    @property
    def threshold(self) -> float | None:
        """Beyond which scores raise an alarm; None for a guard that changes every input."""

    @property
    def identity(self) -> Identity:
        """Hashes of what it was fitted to."""

    @property
    def encode(self) -> Encoder:
        """Makes inputs of the model."""

    def check(self, model: Any, inputs: Dataset | None) -> None:
        """Refuse a model, or inputs, that the guard was not fitted to."""

    def check_inputs(self, inputs: Dataset) -> None:
        """Refuse inputs that the guard was not fitted to."""

    def at_work(self, model: nn.Module, device: str | None, precision: Precision) -> AbstractContextManager[Work]:
        """The guard with a model that was checked."""


class Answer(NamedTuple):
    """The output of a guarded model for one input.

    Args:
        decision: of the guard.
        answer: class scores, (classes,), the text of a language model, or what the pipeline returned; None for a
            rejected input.
    """

    decision: Decision
    answer: Any


def is_pipeline(model: object) -> bool:
    """Whether this is a pipeline of transformers: something that can be called, around a model."""
    return not isinstance(model, nn.Module) and callable(model) and isinstance(getattr(model, "model", None), nn.Module)


def check_pipeline(pipeline: Any, fitted: Fitted) -> None:
    """Refuse a pipeline of another task, or around another model or tokenizer than the guard was fitted to."""
    _check_task(pipeline, fitted.encode)
    check_model(fitted.identity.model, pipeline.model)
    if isinstance(fitted.encode, TextEncoder | ConversationEncoder):
        hashed = tokenizer_hash(pipeline.tokenizer, fitted.encode.max_length)
        check_same("tokenizer", fitted.identity.tokenizer, hashed)
        _check_cut(pipeline.tokenizer, fitted.encode.tokenizer)
    if isinstance(fitted.encode, ConversationEncoder):
        hashed = template_hash(dataclasses.replace(fitted.encode, tokenizer=pipeline.tokenizer))
        check_same("template", fitted.identity.template, hashed)


def _check_task(pipeline: Any, encode: Encoder) -> None:
    """Refuse a pipeline of transformers whose inputs are not what its model reads, such as texts beside class names."""
    import transformers

    wanted = next(kind for reads, kind in _PIPELINES.items() if isinstance(encode, reads))
    own = [each for each in type(pipeline).__mro__ if each.__module__.startswith("transformers.")]
    free = (transformers.Pipeline, transformers.pipelines.base.ChunkPipeline)  # a pipeline of the user's own making
    if own and own[0] not in free and not isinstance(pipeline, getattr(transformers, wanted)):
        raise UnbackdoorError(
            f"A guard of this model takes a {wanted}, got a {type(pipeline).__name__}, whose model reads other inputs "
            "than the pipeline. Make that one, or wrap the model."
        )


def _check_cut(tokenizer: Any, own: Any) -> None:
    """Refuse a tokenizer that cuts long texts at the other end than the one that the guard reads them with."""
    if tokenizer.truncation_side != own.truncation_side:
        raise UnbackdoorError(
            f"The tokenizer of the pipeline cuts long texts on the {tokenizer.truncation_side}, and that of the guard "
            f"on the {own.truncation_side}, so that the model would read another part than the guard. Set its "
            f"`truncation_side` to '{own.truncation_side}'."
        )


# Options of a pipeline that change what its model reads, by the encoder of the model.
_READING: dict[type, tuple[str, ...]] = {
    TextEncoder: (
        *("add_special_tokens", "split_special_tokens", "text_pair", "stride", "return_overflowing_tokens"),
        "is_split_into_words",
    ),
    ConversationEncoder: (
        *("prefix", "tools", "documents", "tokenizer_encode_kwargs", "handle_long_generation", "truncation"),
        *("max_length", "continue_final_message", "add_special_tokens"),
    ),
}


def _check_options(options: dict[str, Any], data: Dataset, pipeline: Any) -> None:
    """Refuse options by which a pipeline would read another text, or another part of it, than the guard.

    Args:
        options: of a call.
        data: the inputs.
        pipeline: may have got such options when it was made.
    """
    names = next((names for reads, names in _READING.items() if isinstance(data.encode, reads)), ())
    given = {**getattr(pipeline, "_preprocess_params", {}), **options}
    plain = (None, "", False)
    changing = next(
        (
            name
            for name in names
            if name in given and given[name] not in ((True, None) if name == "add_special_tokens" else plain)
        ),
        None,
    )
    if changing is not None:
        raise UnbackdoorError(
            f"The guard judges a text as its model reads it by itself, so the pipeline must read the same, which "
            f"`{changing}` changes. Leave it out."
        )
    if not isinstance(data.encode, TextEncoder):
        return
    most = data.encode.max_length
    if options.get("max_length", most) != most or not options.get("truncation", True):
        raise UnbackdoorError(
            f"The guard judges the {most:,} tokens of a text that its model reads, so the pipeline must read the same. "
            "Leave `max_length` and `truncation` out."
        )


def _tokenizer_mark(tokenizer: Any) -> object:
    """What differs if a pipeline got another tokenizer, more tokens, another template or end; None if it has none."""
    if tokenizer is None:
        return None
    return id(tokenizer), len(tokenizer), str(tokenizer.chat_template), tokenizer.truncation_side


@dataclass(frozen=True, eq=False)
class Guarded:
    """A model behind a guard; `FittedGuard.wrap` returns it.

    Args:
        fitted: the guard.
        model: a module, or a pipeline of transformers.
        device: of the model; None uses a GPU if there is one.
        precision: see `unbackdoor._models.arithmetic.choose`.
        known: marks of the model and the tokenizer, as they were when they were found to be the fitted ones.
    """

    fitted: Fitted
    model: Any
    device: str | None
    precision: Precision
    known: dict[str, object] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Refuse a model or a tokenizer that the guard was not fitted to; hashes them only if they changed.

        Raises:
            UnbackdoorError: says which part differs.
        """
        piped = is_pipeline(self.model)
        module = self.model.model if piped else self.model
        marks = {
            "weights": weights_mark(module) if isinstance(module, nn.Module) else None,
            "tokenizer": _tokenizer_mark(self.model.tokenizer) if piped else None,
        }
        if marks == self.known:
            return
        if piped:
            check_pipeline(self.model, self.fitted)
        else:
            self.fitted.check(self.model, None)
        self.known.update(marks)

    def __call__(self, inputs: Any, **options: Any) -> list[Answer]:
        """Decide about inputs, and answer those that are not rejected.

        Args:
            inputs: a Dataset; texts, or pairs as tuples or as dicts with `text` and `text_pair`; for a language model
                prompts or lists of messages, each a dict with `role` and `content`; pictures as a tensor, (n,
                channels, height, width), uint8, or as a list of PIL images or paths. A single text, dict, picture or
                list of messages is a list of one. Several texts may also be a column of pandas or an array of numpy.
            options: passed to the pipeline, but for those by which it would read another text, or part of one.

        Raises:
            UnbackdoorError: the inputs are of another kind than those of the guard; or the model or the tokenizer was
                changed, and is no longer the fitted one.
        """
        inputs = _listed(inputs, self.fitted.encode)
        piped = is_pipeline(self.model)
        module = self.model.model if piped else self.model
        with turn(module) if isinstance(module, nn.Module) else nullcontext():
            self.check()
            if isinstance(inputs, list | tuple | Tensor | Dataset) and len(inputs) == 0:
                return []
            data = as_dataset(inputs, self.fitted.encode)
            self.fitted.check_inputs(data)
            if piped:
                _check_options(options, data, self.model)
            with self.fitted.at_work(module, self.device, self.precision) as work:
                judged = work.judged(data, answering=not piped)
            if piped:
                return self._piped(inputs, data, judged, options, work.run)
        return [
            Answer(decision, None if decision.action == "reject" or judged.final is None else judged.final[row])
            for row, decision in enumerate(judged.decisions)
        ]

    def _piped(self, inputs: Any, data: Dataset, judged: Judged, options: dict[str, Any], run: Run) -> list[Answer]:
        """The answers of the pipeline to what passes, to changed texts, and of a restrained model."""
        answers: list[Any] = [None] * len(data)
        accepted = _for_pipeline(inputs, data)
        if isinstance(data.encode, TextEncoder):
            options = {**options, "truncation": True, "max_length": data.encode.max_length}
        if isinstance(run.task, Generation):
            options = {"max_new_tokens": run.task.max_new_tokens, "do_sample": False, **options}
        for row, changed in judged.edited.items():
            accepted[row] = _of_pipeline(changed, data)
        restraining, threshold = restrains(self.fitted.guard), self.fitted.threshold
        for action in ("pass", "clean"):
            rows = [decision.row for decision in judged.decisions if decision.action == action]
            other: AbstractContextManager[None] = nullcontext()
            if restraining and threshold is not None and action == "clean":
                other = restraining.restrained(self.model.model, self.fitted.learnt, threshold, run)
            with other:
                outputs = self.model([accepted[row] for row in rows], **options) if rows else []
            for row, answer in zip(rows, outputs, strict=True):
                answers[row] = answer
        return [Answer(decision, answers[decision.row]) for decision in judged.decisions]


def _listed(inputs: Any, encode: Encoder) -> Any:
    """Texts in a column of pandas or in an array of numpy as a list; anything else as it is."""
    of_texts = isinstance(encode, TextEncoder | ConversationEncoder) and not isinstance(inputs, Tensor)
    return inputs.tolist() if of_texts and getattr(inputs, "ndim", 0) == 1 and hasattr(inputs, "tolist") else inputs


def as_dataset(inputs: Any, encode: Encoder) -> Dataset:
    """Returns inputs of any kind as a data set without labels.

    Raises:
        UnbackdoorError: they are of another kind than the encoder reads.
    """
    if isinstance(inputs, Dataset):
        return inputs
    name = "the batch"
    if isinstance(encode, ConversationEncoder):
        items = _conversations(inputs, name)
        return Dataset(items=items, labels=_none(len(items)), encode=dataclasses.replace(encode, blank=True), name=name)
    if isinstance(encode, TextEncoder):
        texts = _texts(inputs, name)
        return Dataset(items=texts, labels=_none(len(texts)), encode=dataclasses.replace(encode, blank=True), name=name)
    if isinstance(inputs, Tensor):
        if inputs.ndim != 4 or inputs.dtype != torch.uint8:
            raise UnbackdoorError(
                "The guard takes pictures as a tensor of shape (n, channels, height, width) and type uint8, got shape "
                f"{tuple(inputs.shape)} and {str(inputs.dtype).removeprefix('torch.')}."
            )
        assert isinstance(encode, ImageEncoder)
        raw = dataclasses.replace(encode, done=False)  # whatever the sizes were of the pictures that the guard knows
        return Dataset(items=inputs, labels=_none(len(inputs)), encode=raw, name=name)
    if isinstance(inputs, Iterator | Set) or getattr(inputs, "ndim", 0) > 3:
        raise UnbackdoorError(
            f"The guard takes pictures as a tensor or as a list of PIL images, arrays or paths, got "
            f"{type(inputs).__name__}. Make a list of them."
        )
    pictures = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    images, encode = encode.read({"image": pictures}, name, None)
    return Dataset(items=images, labels=_none(len(images)), encode=encode, name=name)


def _conversations(inputs: Any, name: str) -> Conversations:
    """Prompts, or lists of messages, as conversations."""
    one = isinstance(inputs, str) or (isinstance(inputs, list | tuple) and all(isinstance(x, dict) for x in inputs))
    several = [inputs] if one else inputs
    if not isinstance(several, list | tuple) or not all(isinstance(each, str | list | tuple) for each in several):
        raise UnbackdoorError(
            "The guard was fitted to a language model; it takes a list of prompts or of lists of messages, got "
            f"{_kind(inputs)}."
        )
    messages = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in several]
    conversations = conversations_of({"messages": messages}, name, blank=True)
    begun = next((row for row, each in enumerate(conversations) if each.answer), None)
    if begun is not None:
        raise UnbackdoorError(
            f"{name} has an answer that is begun already in row {begun}; the guard judges prompts, whose last message "
            "is of the user. Leave the assistant's out."
        )
    return Conversations(conversations)


def _texts(inputs: Any, name: str) -> Texts:
    """Texts or pairs of texts."""
    several = [inputs] if isinstance(inputs, str | dict) else inputs
    strings = tuple(map(_sides, several)) if isinstance(several, Sequence) else (None,)
    if not all(strings):
        raise UnbackdoorError(
            "The guard was fitted to text; it takes a list of texts, or of pairs as tuples or as dicts with text and "
            f"text_pair, got {_kind(inputs)}. Make a list of them."
        )
    if len({len(each) for each in strings if each}) > 1:
        raise UnbackdoorError("The guard takes texts or pairs of texts, got both. Give them one after the other.")
    wrong = next((row for row, each in enumerate(strings) if not all(map(is_unicode, each or ()))), None)
    if wrong is not None:
        raise UnbackdoorError(f"{name} has text that is not valid Unicode in row {wrong}. Repair or remove that row.")
    columns = ("text",) if not strings or len(strings[0] or ()) == 1 else ("text_a", "text_b")
    return Texts(tuple(each for each in strings if each), columns)


def _sides(entry: Any) -> tuple[str, ...] | None:
    """A text, or the two of a pair; None for anything else."""
    if isinstance(entry, dict) and {"text"} <= entry.keys() <= {"text", "text_pair"}:
        entry = tuple(entry[side] for side in ("text", "text_pair") if side in entry)
    elif isinstance(entry, str) or not isinstance(entry, tuple) or len(entry) != 2:
        entry = (entry,)
    return entry if all(isinstance(side, str) for side in entry) else None


def _kind(inputs: Any) -> str:
    """The type of inputs, and of the entries of a list."""
    kinds = {type(each).__name__ for each in inputs} if isinstance(inputs, list | tuple) else set()
    return f"{type(inputs).__name__} of {' and '.join(sorted(kinds))}" if kinds else type(inputs).__name__


def _none(count: int) -> Tensor:
    return torch.full((count,), -1)


def _for_pipeline(inputs: Any, data: Dataset) -> list[Any]:
    """The inputs one by one, as a pipeline takes them."""
    if isinstance(data.items, Texts | Conversations):
        return [_of_pipeline(each, data) for each in data.identities()]
    from PIL import Image

    if isinstance(inputs, Dataset | Tensor):
        pixels = [picture.permute(1, 2, 0).squeeze(-1).cpu().numpy() for picture in data.pixels]
        return [Image.fromarray(picture).convert("RGB") for picture in pixels]
    several = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    # What the guard saw: a pipeline would show what transparent parts hide, and cut 16 bits to 8 at white.
    return [decode_cell(each, row, data.name, None, Counter()) for row, each in enumerate(several)]


def _of_pipeline(entry: Any, data: Dataset) -> Any:
    """A text, a pair or a conversation, as a pipeline takes it."""
    if isinstance(entry, Conversation):
        if data.conversation_encoder.template == "chat":
            return [{"role": message.role, "content": message.text} for message in entry.messages]
        return data.conversation_encoder.texts(Conversations((entry,)))[0]
    strings: tuple[str, ...] = entry
    return strings[0] if len(strings) == 1 else {"text": strings[0], "text_pair": strings[1]}
