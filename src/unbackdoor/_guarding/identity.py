"""Hashes of the model that a guard was fitted to: another model, tokenizer or processor is refused."""

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.dataset import Encoder
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.pair_encoder import PairEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import reading


@dataclasses.dataclass(frozen=True)
class Identity:
    """The hashes (SHA-256) of what a guard works with.

    Args:
        model: of the model's class and all its weights and buffers.
        tokenizer: of the tokenizer and the number of tokens that the model reads; None for images.
        processor: of the steps that bring pictures to the model; None for texts.
        reference: of a second language model and its tokenizer; None if the guard needs none.
        template: of what renders conversations as one text; None for all other inputs.
    """

    model: str
    tokenizer: str | None = None
    processor: str | None = None
    reference: str | None = None
    template: str | None = None


def model_hash(model: nn.Module) -> str:
    """The hash of a model's class, and of the names, types, shapes and numbers of its weights and buffers."""
    digest = hashlib.sha256(type(model).__name__.encode())
    state: dict[str, Tensor] = model.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_mark(model: nn.Module) -> tuple[tuple[object, ...], ...]:
    """Returns what differs if the weights of a model were changed, without reading all of them as `model_hash` does.

    Of each weight and buffer: which tensor it is, how often torch changed it in place, and the sum of about 64 of its
    rows. A change behind the back of torch, by `weight.data`, is only seen in these rows.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    marks = []
    for name, tensor in state.items():
        changes = 0 if tensor.is_inference() else tensor._version
        some = tensor.detach() if tensor.ndim == 0 else tensor.detach()[:: len(tensor) // 64 + 1]
        marks.append((name, id(tensor), changes, tensor.dtype, tensor.shape, float(some.double().sum())))
    return tuple(marks)


def tokenizer_hash(tokenizer: Any, max_length: int | None = None) -> str:
    """The hash of a tokenizer and the number of tokens that are read: how it pads and cuts is left to its caller."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = _of_python(tokenizer)
    else:
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    plain = json.dumps([content, max_length], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _of_python(tokenizer: Any) -> dict[str, Any]:
    """What tells a tokenizer that is written in Python from others: its words, and what it makes of some texts.

    Its settings (lower case, accents, merges) have other names and places in each class.
    """
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary)
    texts = [*_TEXTS, *words[:: len(words) // 1000 + 1]]
    with reading("the tokenizer of the model"):
        tokens = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
        pair = tokenizer("a", "b", verbose=False)["input_ids"]
    return {"class": type(tokenizer).__name__, "vocabulary": vocabulary, "tokens": [*tokens, pair]}


_TEXTS = (
    "Hello WORLD, don't stop!  3.14 and 1,000\t(e.g. 50 %)\n-- @user #tag http://a.b/c?d=e",
    "Caf\u00e9 na\u00efve Stra\u00dfe \u0130stanbul e\u0301",
    "\u4e2d\u6587 \u3042\u308a \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f642 \u200b \u00a0 \u2026 \u201cquoted\u201d",
)


def template_hash(encode: ConversationEncoder) -> str:
    """The hash of the name of a template and, if it is the tokenizer's own, of its text."""
    own = encode.tokenizer.chat_template if encode.template == "chat" else None
    return hashlib.sha256(json.dumps([encode.template, own], sort_keys=True).encode()).hexdigest()


def encoder_hashes(encode: Encoder) -> dict[str, str]:
    """Returns the hashes of a tokenizer and a template, or of a processor, by their names in `Identity`."""
    if isinstance(encode, ImageEncoder):
        plain = repr(dataclasses.replace(encode, done=False))
        return {"processor": hashlib.sha256(plain.encode()).hexdigest()}
    if isinstance(encode, PairEncoder):
        return {**encoder_hashes(encode.images), **encoder_hashes(encode.texts)}
    tokenizer = {"tokenizer": tokenizer_hash(encode.tokenizer, encode.max_length)}
    return tokenizer | ({"template": template_hash(encode)} if isinstance(encode, ConversationEncoder) else {})


def check_reading(encode: Encoder, max_length: int | None, template: str | None) -> None:
    """Refuse an encoder that reads more or fewer tokens, or renders prompts otherwise, than that of a guard.

    Args:
        encode: makes the inputs.
        max_length: number of tokens that were read when the guard was fitted; None for images.
        template: name of the template of a language model; None for others.

    Raises:
        UnbackdoorError: says which option to give.
    """
    if isinstance(encode, ImageEncoder | PairEncoder):
        return
    if max_length is not None and encode.max_length != max_length:
        raise UnbackdoorError(
            f"The guard was fitted to a model that reads {max_length:,} tokens, and here it reads "
            f"{encode.max_length:,}. Give `max_length={max_length}`, or fit a guard again."
        )
    if isinstance(encode, ConversationEncoder) and template is not None and encode.template != template:
        raise UnbackdoorError(
            f"The guard was fitted to prompts of the {template} template, and here they are rendered by the "
            f"{encode.template} template. Give `template={template}`, or fit a guard again."
        )


def check_unchanged(guard: object, model: nn.Module, before: str) -> None:
    """Refuse the work of a guard that changed the model.

    Args:
        guard: the guard.
        model: as it is afterwards.
        before: its hash.
    """
    if model_hash(model) != before:
        raise UnbackdoorError(f"{type(guard).__name__} must leave the model as it is, but changed its weights.")


def check_model(fitted: str, model: nn.Module) -> None:
    """Refuse a model other than the one that a guard was fitted to, and one within a wrapper of torch.

    Raises:
        UnbackdoorError: says what to give.
    """
    inner = next((name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), nn.Module)), None)
    if inner is not None and type(model).__module__.startswith("torch."):
        raise UnbackdoorError(
            f"A guard watches the parts of a model, which are within the {type(model).__name__} here. Give the model "
            f"that is in it (`model.{inner}`)."
        )
    check_same("model", fitted, model_hash(model))


def check_same(part: str, fitted: str | None, actual: str | None) -> None:
    """Refuse a model, tokenizer, template, processor or reference other than the one that a guard was fitted to.

    Raises:
        UnbackdoorError: names the part.
    """
    if fitted != actual:
        same = f"{part} in the precision that it had" if part == "model" else part
        raise UnbackdoorError(
            f"The guard was fitted to another {part} (SHA-256 {(fitted or 'none')[:12]}, not "
            f"{(actual or 'none')[:12]}). Give that {same}, or fit a guard to this one."
        )
