"""Write a model for the tool that loaded it, and check the result."""

import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.image_processors import preprocessor_of
from unbackdoor._data.images import ImageEncoder
from unbackdoor._data.pair_encoder import PairEncoder, PairTokens
from unbackdoor._data.texts import TextEncoder, Tokens
from unbackdoor._errors import IncompleteError, UnbackdoorError, printable
from unbackdoor._inputs import read_json
from unbackdoor._models.adapters import save_adapter
from unbackdoor._models.calling import Inputs, check_modules, class_names, evaluating, logits, probe, unwrapped
from unbackdoor._models.companions import copy_companions
from unbackdoor._models.directory import ModelDirectory
from unbackdoor._models.hugging_face import PLAIN_OUTPUT, quiet_transformers
from unbackdoor._models.image_encoder import processor_encoder
from unbackdoor._models.loading import Loaded, load
from unbackdoor._models.stored_types import stored_types

logger = logging.getLogger("unbackdoor")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

GENERATION = "generation_config.json"

_INPUTS = "other inputs"

_POSITIONS = re.compile("^rope_|rotary")  # fields of a config that say how positions are encoded


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    source: str | os.PathLike[str] | None = None,
    encode: Encoder | None = None,
) -> None:
    """Write a model so that the tool which loaded it loads it again.

    Args:
        model: a Hugging Face model (saved with its config, also out of a DataParallel), an adapter (saved without its
            base), or any module (`model.safetensors` with its own keys).
        folder: an empty directory, or one that is made.
        source: the Hugging Face directory that it came from, a path or the `directory` of what `load` returned; its
            tokenizer or processor files are copied.
        encode: encoder of its inputs; it is written as a tokenizer or processor if the source has none, or another one.

    Raises:
        UnbackdoorError: the directory cannot be made, is a file, or is the source; or the model is no module.
        IncompleteError: the disk is full.
    """
    check_modules("save", model=model)
    if hasattr(unwrapped(model), "save_pretrained"):
        model = unwrapped(model)
    folder = _made(folder, source)
    try:
        _fill(model, folder, source, encode)
    except Exception as problem:
        full = type(problem).__name__ == "SafetensorError" and "os error" in str(problem)
        if full or (isinstance(problem, OSError) and problem.errno in _FULL):
            raise IncompleteError(
                f"{folder} could not be written ({printable(problem, 200)}). Free some space."
            ) from None
        raise


def _made(folder: str | Path, source: object) -> Path:
    """Returns the directory to fill, made if there is none."""
    if not isinstance(folder, str | Path) or not str(folder):
        raise UnbackdoorError(f"save takes folder as a path, got {printable(repr(folder))}. Give a new directory.")
    folder = Path(folder)
    if isinstance(source, str | os.PathLike) and folder.exists() and folder.resolve() == Path(source).resolve():
        raise UnbackdoorError(f"{folder} is the source itself, which is not replaced. Give another `folder`.")
    if folder.exists() and not folder.is_dir():
        raise UnbackdoorError(f"save takes folder as a directory, got the file {folder}. Give a new directory.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UnbackdoorError(f"{folder} cannot be made ({problem.strerror}). Give another `folder`.") from None
    return folder


def _fill(model: nn.Module, folder: Path, source: str | os.PathLike[str] | None, encode: Encoder | None) -> None:
    """Write the files of a model into a directory; see `save`."""
    from safetensors.torch import save_file

    if hasattr(model, "peft_config"):
        origin = None if source is None else Path(source)
        save_adapter(model, folder, source=origin)
        if origin is not None and origin.is_dir():
            copy_companions(origin, folder)
        return
    if not hasattr(model, "save_pretrained"):
        # Tensors that share memory are written once each: the module's own keys must all be there.
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _as_stored(model).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    origin = None if source is None else Path(source)
    with quiet_transformers():
        model.save_pretrained(folder, **_shard_size(origin))  # type: ignore[operator]
    _say_untied(model, folder / "config.json")
    if origin is not None and origin.is_dir():
        _restore_fields(_config_of(source, origin), folder / "config.json")
        if (origin / GENERATION).is_file() and (folder / GENERATION).is_file():
            (folder / GENERATION).unlink()  # what transformers wrote is its own reading of it
        copy_companions(origin, folder)
    if isinstance(encode, TextEncoder | ConversationEncoder):
        _write_tokenizer(folder, encode, origin)
        return
    if isinstance(encode, PairEncoder):
        if not (folder / "tokenizer_config.json").exists():
            encode.texts.tokenizer.save_pretrained(folder)
        encode = encode.images
    if encode is not None and not _encodes_alike(folder, model, encode):
        content = preprocessor_of(encode)
        _write_json(folder / "preprocessor_config.json", content)
        nested = folder / "processor_config.json"
        if nested.exists():  # transformers reads this one first
            _write_json(nested, {**read_json(nested), "image_processor": content})


def _as_stored(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a module, by name, in the types in which they came.

    Raises:
        UnbackdoorError: a number is too large for such a type.
    """
    weights: dict[str, Tensor] = model.state_dict()
    for name, dtype in stored_types(model).items():
        weights[name], before = weights[name].to(dtype), weights[name]
        if not torch.equal(weights[name].isfinite(), before.isfinite()):
            raise UnbackdoorError(
                f"save got values in {printable(name)} that are too large for {str(dtype)[6:]}, the type of the file "
                "that the model came from. Load it from a file in float32."
            )
    return weights


def _say_untied(model: Any, written: Path) -> None:
    """Let the config say that a language model has two matrices, if it has: transformers 4 would make one of them.

    Adapters of the output layer or of the embeddings, once merged, leave such models, with a config that ties the two.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    if head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr():
        _write_json(written, {**json.loads(written.read_text(encoding="utf-8")), "tie_word_embeddings": False})


def _config_of(source: object, origin: Path) -> Mapping[str, Any]:
    """Returns the config of a directory that a model came from, without reading it again; empty if it has none."""
    if isinstance(source, ModelDirectory):
        return source.config
    return read_json(origin / "config.json") if (origin / "config.json").exists() else {}


def _restore_fields(before: Mapping[str, Any], written: Path) -> None:
    """Write the fields of a config again that loading had set to plain values, and those that have other names now.

    transformers 5 writes `dtype` and `rope_parameters`, which earlier versions and other programs do not read: without
    `rope_theta` and `rope_scaling` they take the model for one with other positions.
    """
    content = json.loads(written.read_text(encoding="utf-8"))
    changed = {field: entry for field, entry in before.items() if PLAIN_OUTPUT.get(field, entry) != entry}
    changed |= {field: entry for field, entry in before.items() if _POSITIONS.search(field) and field not in content}
    if "torch_dtype" in before and "dtype" in content:
        changed["torch_dtype"] = content["dtype"]
    if changed:
        _write_json(written, {**content, **changed})


def _write_tokenizer(folder: Path, encode: TextEncoder | ConversationEncoder, origin: Path | None) -> None:
    """Write a tokenizer if the directory has none, or another one: that of a base, for an adapter that was merged."""
    if isinstance(encode, TextEncoder) and encode.borrowed_padding:  # the tokenizer's files name another padding
        _write_json(folder / "config.json", {**read_json(folder / "config.json"), "pad_token_id": None})
    own = isinstance(encode, ConversationEncoder) and encode.where != str(origin)
    if own or not (folder / "tokenizer_config.json").exists():
        encode.tokenizer.save_pretrained(folder)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shard_size(origin: Path | None) -> dict[str, int]:
    """As an option of `save_pretrained`, the length of the longest file of a model that came in several files."""
    shards = (
        [] if origin is None else [*origin.glob("model-*-of-*.safetensors"), *origin.glob("pytorch_model-*-of-*.bin")]
    )
    return {"max_shard_size": max(file.stat().st_size for file in shards)} if shards else {}


def check_saved(
    folder: Path,
    model: nn.Module,
    encode: Encoder,
    data: Dataset | None,
    *,
    factory: str | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Load a model that was written, and compare it with the one in memory, before its directory gets its name.

    Args:
        folder: the written directory.
        model: the one in memory.
        encode: encoder of its inputs.
        data: some examples for both; None if there are none.
        factory: see `load`.
        base: see `load`.
        trust_remote_code: see `load`.

    Raises:
        IncompleteError: the model cannot be loaded; or its weights, class names, inputs or answers differ.
    """
    try:
        with _silent():  # what there is to say of the model was said when it came
            loaded = load(folder, factory=factory, base=base, trust_remote_code=trust_remote_code)
    except UnbackdoorError as problem:
        raise IncompleteError(
            f"The result cannot be loaded again, so nothing was kept: {str(problem).replace(str(folder), 'it')}"
        ) from None
    differing = _difference(Loaded(model, encode), loaded, data)
    if differing == _INPUTS and isinstance(encode, ConversationEncoder):
        _check_same_tokenizer(encode, loaded.encode, model)
    if differing is not None:
        raise IncompleteError(
            f"The result, loaded again, has {differing} than it should have, so nothing was kept. Look at the model's "
            "config.json and its tokenizer or processor."
        )


def _check_same_tokenizer(ours: ConversationEncoder, theirs: Encoder, model: nn.Module) -> None:
    """Refuse a tokenizer that transformers reads as another kind next to the config of a model.

    Next to some configs (Qwen2) it takes the model's own kind, whatever the tokenizer's files say. So it happens to the
    tokenizer of an adapter, which has no such config next to it, once the adapter is merged; or to that of a GGUF file.

    Raises:
        IncompleteError: names both kinds.
    """
    kinds = [type(each.tokenizer).__name__ for each in (ours, theirs) if isinstance(each, ConversationEncoder)]
    if len(set(kinds)) == 2:
        way_out = (
            "Give the model as a Hugging Face directory."
            if Path(ours.where).is_file()
            else "Purify the adapter without `merge`; or, if it was trained with the tokenizer of its base, remove the "
            "files of its own."
        )
        raise IncompleteError(
            f"{printable(ours.where)} has a tokenizer of its own, a {kinds[0]}, which transformers would read as a "
            f"{kinds[1]} next to the config of a {type(model).__name__}: the result would get other tokens, so nothing "
            f"was kept. {way_out}"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Keep notes and warnings back, which would name a directory that is not there afterwards."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@torch.no_grad()
def _difference(saved: Loaded, loaded: Loaded, data: Dataset | None) -> str | None:
    """Returns the difference between a saved model and the same one loaded again; None if there is none."""
    ours, theirs = saved.model.state_dict(), loaded.model.state_dict()
    if type(saved.model).__name__ != type(loaded.model).__name__:  # a factory defines its classes at each call
        return "another class"
    if ours.keys() != theirs.keys() or any(tensor.dtype != theirs[name].dtype for name, tensor in ours.items()):
        return "weights of other names or types"
    if not all(torch.equal(tensor.cpu(), theirs[name]) for name, tensor in ours.items()):
        return "other weights"
    if class_names(saved.model) != class_names(loaded.model):
        return "other names of its classes"
    if data is None:
        return None
    before, after = (probe(each.model, replace(data, encode=each.encode)) for each in (saved, loaded))
    if before.shape != after.shape or not _equal(before, after):
        return _INPUTS
    with evaluating(saved.model), evaluating(loaded.model):
        one, other = logits(saved.model, before).float().cpu(), logits(loaded.model, after).float()
    scale = float(one.abs().max())
    return None if torch.allclose(one, other, rtol=1e-3, atol=1e-3 * scale) else "other answers"


def _equal(one: Inputs, other: Inputs) -> bool:
    if isinstance(one, PairTokens) and isinstance(other, PairTokens):
        return _equal(one.captions, other.captions) and _equal(one.pixels, other.pixels)
    if isinstance(one, Tokens) and isinstance(other, Tokens):
        return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name]) for name in one)
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    return torch.allclose(one.cpu(), other, atol=1e-5)


def _encodes_alike(folder: Path, model: Any, encode: ImageEncoder) -> bool:
    """Whether a directory already has a processor with the same steps as the encoder."""
    try:
        return processor_encoder(folder, encode.channels, model.config.model_type) == replace(encode, done=False)
    except UnbackdoorError:
        return False
