"""Loading models of any kind: a suspect with the encoder of its inputs, or its pre-trained base."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from unbackdoor._data.class_prompts import ClassPrompts
from unbackdoor._data.conversation_encoder import ConversationEncoder, Template
from unbackdoor._data.dataset import Encoder
from unbackdoor._data.images import LARGEST_SIDE, ImageEncoder
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import exists, read_json, reader
from unbackdoor._models.adapters import CONFIG_FILE, adapted_by, class_count, is_adapter, merged, named_task
from unbackdoor._models.calling import embeddings
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.factory import from_factory
from unbackdoor._models.gguf import gguf_model, is_gguf, refuse_part
from unbackdoor._models.image_text import pair_encoder
from unbackdoor._models.language_models import conversation_encoder
from unbackdoor._models.recorded import recorded_image_encoder
from unbackdoor._models.tokenizer import tokenizer_of
from unbackdoor._models.untrusted_weights import foreign

logger = logging.getLogger("unbackdoor")


class Loaded(NamedTuple("Loaded", [("model", nn.Module), ("encode", Encoder)])):
    """A model and the encoder that makes its inputs; it unpacks into the two.

    Args:
        model: the model in eval mode.
        encode: encoder that makes its inputs.
        directory: directory that it came from; None for a module of a factory.
    """

    directory: ModelDirectory | None

    def __new__(cls, model: nn.Module, encode: Encoder, directory: ModelDirectory | None = None) -> "Loaded":
        loaded = super().__new__(cls, model, encode)
        loaded.directory = directory
        return loaded


@reader("source")
def load(
    source: str | Path,
    *,
    factory: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    template: Template | None = None,
    prompts: str | Path | ClassPrompts | None = None,
    base: str | Path | None = None,
    merge: bool = False,
    offload: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a suspect: a classifier of images or texts, a model of both, a causal language model, or an adapter of one.

    Args:
        source: a Hugging Face directory or Hub name; a GGUF file; or, with a factory, a weights file or a directory
            with `model.safetensors`.
        factory: `FILE.py:FUNCTION` that makes the module without arguments. This file is run, so it must be your own.
        mean: mean per channel of pixels in [0, 1]; by default the directory's own, else 0.
        std: standard deviation per channel; by default the directory's own, else 1.
        image_size: side to resize to, in pixels; by default the directory's own, else the data's.
        max_length: number of tokens that a text model reads; by default the directory's own, else the most that it can.
        template: how the prompts of a language model are rendered: `chat`, `alpaca` or `plain`; by default as its
            record says, else by the tokenizer's chat template.
        prompts: the texts that stand for the classes of a model of images and texts: a template with `{}` at the place
            of the class name, or a JSON file with a list of such templates or with a text for each class; by default
            as its record says, else "a photo of a {}.".
        base: of a PEFT LoRA adapter: the directory or Hub name of the model that it was trained on.
        merge: add the adapter to its base: the result is a whole model, which every method takes.
        offload: of a language model that does not fit into memory: the device that `evaluate` will score it on, or
            `auto` (a GPU if there is one); parts lie in memory or on disk until a pass needs them (accelerate), and
            are computed in their own number type. None refuses such a model; one that fits is loaded as ever.
        trust_remote_code: run Python files that come with a Hugging Face model.

    Raises:
        UnbackdoorError: an option is out of bounds, a file is missing or damaged, or the model is not a supported one.
    """
    changes = _encoder_changes(mean, std, image_size)
    path = _path(source)
    adapter = path.is_dir() and is_adapter(path)
    if factory is not None:
        _check_unused(source, template=template, prompts=prompts)
        if max_length is not None:
            raise UnbackdoorError("`max_length` is for text models; a module from a factory gets pixels. Leave it out.")
        return _load_made(path, factory, changes)
    chat = _Chat(template, max_length, changes, trust_remote_code)
    if adapter:
        _check_unused(source, prompts=prompts)
        return _load_adapter(path, base, merge, chat)
    alone = {"merge": merge or None, "base": base}
    if path.is_file():
        if is_gguf(path):
            refuse_part(path)
        _check_unused(source, **alone)
        return _load_file(path, chat, prompts)
    directory = ModelDirectory.of(source, "`source`", trust_remote_code=trust_remote_code)
    _check_unused(source, **alone)
    directory.companions()  # refuses files early that could not be copied at the end
    if directory.modality == "conversations":
        _check_unused(source, prompts=prompts)
        model = directory.language_model(offload)
        return Loaded(model, chat.encoder(directory.path, model), directory)
    _check_unused(source, template=template)
    if directory.modality == "image-text":
        model = directory.image_text_model()
        encode = pair_encoder(
            directory.path,
            model,
            changes=changes,
            max_length=max_length,
            prompts=prompts,
            trust_remote_code=trust_remote_code,
        )
        return Loaded(model, encode, directory)
    _check_unused(source, prompts=prompts)
    model = directory.classifier()
    return Loaded(model, directory.encoder(model, changes=changes, max_length=max_length), directory)


_OF_OTHERS = {
    "merge": "is not an adapter; `merge` is for these",
    "base": "is not an adapter; `base` is for these",
    "template": "is not a language model; `template` is for their prompts",
    "prompts": "is not a model of images and texts; `prompts` are the texts of the classes of these",
}


def _check_unused(source: object, **options: object) -> None:
    """Refuse options that are for other kinds of models than a source is.

    Raises:
        UnbackdoorError: names the first of them that is given.
    """
    for option, setting in options.items():
        if setting is not None:
            raise UnbackdoorError(f"{source} {_OF_OTHERS[option]}. Leave it out.")


def _path(source: object) -> Path:
    if not isinstance(source, str | Path):
        raise UnbackdoorError(f"`source` must be a path or a Hub name, got {type(source).__name__}.")
    if not str(source):  # for Path, this is the current directory
        raise UnbackdoorError("`source` must be a directory, a Hub name or a weights file, got an empty name.")
    return Path(source)


class _Chat(NamedTuple):
    """How the prompts of a language model are made: what the user set, if anything."""

    template: Template | None
    max_length: int | None
    changes: dict[str, Any]
    trust_remote_code: bool

    def encoder(self, path: Path, model: nn.Module, tokenizer: Any = None) -> ConversationEncoder:
        """The encoder of a model, with the tokenizer of a directory or a given one.

        Raises:
            UnbackdoorError: an option is for images, or the tokenizer does not fit the model.
        """
        if self.changes:
            raise UnbackdoorError(
                f"{path} continues text; `mean`, `std` and `image_size` are for images. Leave them out."
            )
        return conversation_encoder(
            path,
            model,
            tokenizer=tokenizer,
            template=self.template,
            max_length=self.max_length,
            trust_remote_code=self.trust_remote_code,
        )


def _load_adapter(path: Path, base: str | Path | None, merge: bool, chat: _Chat) -> Loaded:
    task, named = named_task(path), read_json(path / CONFIG_FILE).get("base_model_name_or_path")
    if base is None:
        raise UnbackdoorError(
            f"{path} is an adapter, and its config names {printable(named)} as its base, which is not fetched unasked. "
            "Give `base`: the directory or Hub name of that model."
        )
    beneath = ModelDirectory.of(base, "`base`", trust_remote_code=chat.trust_remote_code)
    classes = class_count(path)
    if classes is None and beneath.modality != "conversations":
        why = "names no other task" if task is None else "is an adapter of one"
        raise UnbackdoorError(f"`base` must be a causal language model, since {path} {why}; got {base}.")
    if classes is not None and beneath.modality not in ("conversations", "text"):
        raise UnbackdoorError(
            f"`base` must be a model of texts, since {path} is an adapter of a classifier of texts; got {base}."
        )
    if isinstance(named, str) and named and Path(named).name != Path(base).name:
        logger.warning(
            "%s: its config names %s as its base, not %s. Layers and shapes are compared, but another model of the "
            "same shapes would make it another model.",
            path,
            printable(named),
            base,
        )
    if classes is not None:
        return _load_classifier_adapter(path, beneath, classes, merge, chat)
    adapted = adapted_by(path, beneath.language_model(), merging=merge)
    rows = embeddings(adapted).num_embeddings
    own = (path / "tokenizer_config.json").exists()
    tokenizer = None if own else tokenizer_of(beneath.path, chat.trust_remote_code, rows)
    encode = chat.encoder(path, adapted, tokenizer)
    return Loaded(merged(adapted), encode, beneath) if merge else Loaded(adapted, encode)


def _load_classifier_adapter(path: Path, beneath: ModelDirectory, classes: int, merge: bool, chat: _Chat) -> Loaded:
    """Loads an adapter of a text classifier; its classes have the names in the base's config if these are as many."""
    _check_unused(path, template=chat.template)
    names = beneath.config.get("id2label") or {}
    named = [str(names.get(str(number), "")) for number in range(classes)]
    own = len(names) == classes and all(named)
    with torch.random.fork_rng():  # which draws weights that those of the adapter replace
        model = beneath.fresh_classifier(named if own else [f"LABEL_{number}" for number in range(classes)])
        adapted = adapted_by(path, model, merging=merge)
    encode = beneath.encoder(adapted, changes=chat.changes, max_length=chat.max_length)
    return Loaded(merged(adapted), encode, beneath) if merge else Loaded(adapted, encode)


def _encoder_changes(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, image_size: int | None
) -> dict[str, Any]:
    """Returns the fields of `ImageEncoder` that options set.

    Raises:
        UnbackdoorError: one of them is out of bounds.
    """
    for option, numbers in (("mean", mean), ("std", std)):
        if numbers is not None and (len(numbers) not in (1, 3) or (option == "std" and min(numbers) <= 0)):
            allowed = "1 or 3 numbers" if option == "mean" else "1 or 3 numbers above 0"
            raise UnbackdoorError(f"`{option}` must be {allowed}, got {','.join(f'{part:g}' for part in numbers)}.")
        if numbers is not None and max(numbers) > 1:
            raise UnbackdoorError(
                f"`{option}` is for pixels from 0 to 1, got {','.join(f'{part:g}' for part in numbers)}. If it is for "
                "pixels from 0 to 255, divide it by 255."
            )
    if image_size is not None and not (type(image_size) is int and 1 <= image_size <= LARGEST_SIDE):
        bound = "at least 1" if type(image_size) is int and image_size < 1 else f"at most {LARGEST_SIDE:,} pixels"
        raise UnbackdoorError(f"`image_size` must be {bound}, got {printable(image_size)}.")
    fields = {"mean": mean, "std": std, "size": None if image_size is None else (image_size, image_size)}
    return {field: setting for field, setting in fields.items() if setting is not None}


def _load_made(path: Path, factory: str, changes: dict[str, Any]) -> Loaded:
    """Loads the module of a factory with the weights of a file, or of a directory that `save` wrote."""
    if any(len(changes.get(field, ())) == 3 for field in ("mean", "std")):
        changes = {**changes, "channels": 3}
    encode = ImageEncoder()
    if path.is_dir():
        encode = recorded_image_encoder(path)
        if not exists(path / "model.safetensors"):
            raise UnbackdoorError(
                f"{path} has no model.safetensors, which a directory needs with `factory`. Give the file with the "
                "weights itself."
            )
        path = path / "model.safetensors"
    model, encode = from_factory(path, factory), replace(encode, **changes)
    return Loaded(model, replace(encode, channels=_channels(model)) if encode.channels is None else encode)


def _channels(model: nn.Module) -> int | None:
    """Returns 1 or 3, the channels of pictures that the convolutions of a model take; None if they do not show it.

    Pictures of grey things are often files in colour, and the other way around.
    """
    accepted = {module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)} & {1, 3}
    return accepted.pop() if len(accepted) == 1 else None


def _load_file(path: Path, chat: _Chat, prompts: object) -> Loaded:
    if not is_gguf(path):
        raise _lone_file(path)
    _check_unused(path, prompts=prompts)
    model, tokenizer = gguf_model(path)
    return Loaded(model, chat.encoder(path, model, tokenizer))


def _lone_file(path: Path) -> UnbackdoorError:
    """Returns the error for a file instead of a directory; it says what to give instead."""
    program = foreign(path)
    if program is not None:
        return UnbackdoorError(
            f"{path} holds weights for {program}; PyTorch weights are expected. Convert it, or ask its owner for "
            "model.safetensors."
        )
    if (path.parent / "config.json").exists():
        return UnbackdoorError(
            f"{path} is one file of the model that config.json describes. Give their directory, {path.parent}."
        )
    if path.suffix.lower() not in ("", ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".th", ".tar", ".pkl"):
        return UnbackdoorError(
            f"{path} is not a model, which is a Hugging Face directory, a Hub name, or a weights file for "
            "`factory=FILE.py:FUNCTION`. Give one of these."
        )
    return UnbackdoorError(
        f"{path} holds weights without an architecture. Give `factory=FILE.py:FUNCTION` that makes the module."
    )


_WHOLE = {"conversations": "a causal language model", "image-text": "a model of images and texts"}


@reader("source")
def load_base(
    source: str | Path | ModelDirectory,
    *,
    factory: str | None = None,
    modality: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load the pre-trained model that a suspect came from: of a classifier without a head, of others whole.

    Args:
        source: a Hugging Face directory or Hub name.
        factory: see `load`.
        modality: kind of data that the suspect takes; None for a classifier.
        trust_remote_code: see `load`.

    Raises:
        UnbackdoorError: a file is missing or damaged, or the model is not a supported one.
    """
    if factory is not None:
        return load(Path(source), factory=factory).model
    directory = ModelDirectory.of(source, "`base`", trust_remote_code=trust_remote_code)
    if modality in _WHOLE and directory.modality != modality:
        raise UnbackdoorError(f"`base` must be {_WHOLE[modality]}, as the suspect is; got {source}.")
    base: nn.Module
    if modality == "conversations":
        base = directory.language_model()
    else:
        base = directory.image_text_model() if modality == "image-text" else directory.body()
    return base


@reader("source")
def base_encoder(
    source: str | Path | ModelDirectory,
    *,
    max_length: int | None = None,
    prompts: bool = False,
    template: Template | None = None,
    class_prompts: str | None = None,
) -> Encoder:
    """Returns the encoder of a model that a victim starts from: an image classifier, or a pre-trained text model.

    Args:
        source: a directory or Hub name.
        max_length: number of tokens that a text model reads.
        prompts: whether the data are prompts, which a causal language model continues; it classifies other texts.
        template: how it renders them.
        class_prompts: of a model of images and texts: the texts of its classes, see `load`.

    Raises:
        UnbackdoorError: a file is missing or damaged, the model is not a supported one, or it cannot continue prompts.
    """
    directory = ModelDirectory.of(source, "`base`")
    directory.companions()  # refuses files early that could not be copied at the end
    if prompts and directory.modality == "conversations":
        return conversation_encoder(
            directory.path, directory.language_model(), template=template, max_length=max_length
        )
    _check_unused(source, template=template)
    if directory.modality == "image-text":
        return pair_encoder(directory.path, directory.image_text_model(), max_length=max_length, prompts=class_prompts)
    model = directory.classifier() if directory.modality == "images" else directory.body()
    return directory.encoder(model, max_length=max_length)
