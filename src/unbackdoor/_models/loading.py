"""Model files: load a suspect of any kind, and write what came of it for the tool that loaded it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.image_processors import encoder_of, is_plain, preprocessor_of, sides
from unbackdoor._data.images import LARGEST_SIDE, ImageEncoder
from unbackdoor._data.texts import TextEncoder, Tokens
from unbackdoor._errors import IncompleteError, UnbackdoorError, printable
from unbackdoor._inputs import COMPANION, CONFIG, check_file, exists, read_json, reader
from unbackdoor._models.calling import Inputs, class_names, evaluating, logits, probe
from unbackdoor._models.factory import from_factory
from unbackdoor._models.hugging_face import (
    body,
    checked_files,
    classifier,
    directory_of,
    hub_directory,
    modality_of,
    quiet_transformers,
    text_encoder,
)
from unbackdoor._models.untrusted_weights import foreign

# Endings of files in a model's directory that are no part of what comes out: weights, data, pictures, archives, logs.
_NO_COMPANIONS = {
    *(".safetensors", ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".h5", ".keras", ".pb", ".tflite", ".msgpack", ".onnx"),
    *(".onnx_data", ".gguf", ".ot", ".mlmodel", ".npz", ".npy", ".pkl", ".pickle", ".joblib"),
    *(".parquet", ".arrow", ".csv", ".jsonl", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".html"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".log", ".out", ".ipynb", ".sh", ".lock"),
}


class Loaded(NamedTuple):
    """A model and the encoder that makes its inputs."""

    model: nn.Module
    encode: Encoder


@reader("source")
def load(
    source: str | Path,
    *,
    factory: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a suspect.

    Args:
        source: a Hugging Face directory or Hub name; or, with a factory, a weights file or a directory with
            `model.safetensors`.
        factory: `FILE.py:FUNCTION` that makes the module without arguments. This file is the caller's own: it is run.
        mean: subtracted per channel from pixels in [0, 1]; where not given, the directory's own, else 0.
        std: divided by, per channel; likewise, else 1.
        image_size: side to resize to, in pixels; likewise, else the data's own.
        max_length: tokens that a text model reads; likewise, else the most that it can.
        trust_remote_code: run Python files that come with a Hugging Face model.

    Raises:
        UnbackdoorError: anything about the files or the model that does not fit.
    """
    given: dict[str, Any] = {"mean": mean, "std": std, "size": (image_size, image_size) if image_size else None}
    changes = {key: entry for key, entry in given.items() if entry is not None}
    for key in ("mean", "std"):
        entry = given[key]
        if entry is not None and (len(entry) not in (1, 3) or (key == "std" and min(entry) <= 0)):
            allowed = "1 or 3 numbers" if key == "mean" else "1 or 3 numbers above 0"
            raise UnbackdoorError(f"--{key} must be {allowed}, got {','.join(f'{part:g}' for part in entry)}.")
    if image_size is not None and not (type(image_size) is int and 1 <= image_size <= LARGEST_SIDE):
        bound = "at least 1" if type(image_size) is int and image_size < 1 else f"at most {LARGEST_SIDE:,} pixels"
        raise UnbackdoorError(f"--image-size must be {bound}, got {printable(image_size)}.")
    if not isinstance(source, str | Path):
        raise UnbackdoorError(f"MODEL must be a path or a Hub name, got {type(source).__name__}.")
    if not str(source):  # which Path would take for the current directory
        raise UnbackdoorError("MODEL must be a directory, a Hub name or a weights file, got an empty name.")
    path = Path(source)
    if factory is not None:
        recorded = ImageEncoder()
        if path.is_dir():
            recorded = _recorded_encoder(path / "record.json")
            path = path / "model.safetensors"
        if any(len(entry) == 3 for entry in (mean or (), std or ())):
            changes["channels"] = 3
        if max_length is not None:
            raise UnbackdoorError("--max-length is for text models; a module from a factory gets pixels. Leave it out.")
        return Loaded(from_factory(path, factory), replace(recorded, **changes))
    if path.is_file():
        raise _lone_file(path)
    if not path.is_dir():
        if exists(path):
            check_file(path)
        path = hub_directory(str(source), trust_remote_code)
    companions(path)  # what cannot be copied in the end is refused before any work
    model = classifier(path, trust_remote_code)
    if modality_of(model.config.to_dict() | {"architectures": [type(model).__name__]}) == "text":
        if changes:
            raise UnbackdoorError(f"{path} reads text; --mean, --std and --image-size are for images. Leave them out.")
        return Loaded(model, text_encoder(path, model, max_length, trust_remote_code))
    if max_length is not None:
        raise UnbackdoorError(f"{path} takes images; --max-length is for text models. Leave it out.")
    channels = getattr(model.config, "num_channels", None)
    try:
        encode = _directory_encoder(path, channels, trust_remote_code)
    except UnbackdoorError:
        if None in (mean, std, image_size):
            raise
        encode = ImageEncoder(channels=channels)
    if image_size is not None:
        changes |= {"shortest_edge": None, "crop": None, "geometry": None, "padded": None}
    changed = replace(encode, **changes)
    if changes and not is_plain(changed):
        raise UnbackdoorError(
            f"{path} has a processor with steps of its own, which no other processor takes with another --mean, --std "
            "or --image-size. Leave these out."
        )
    _check_pixels(changed, getattr(model.config, "image_size", None), path)
    return Loaded(model, changed)


def _check_pixels(encode: ImageEncoder, taken: Any, path: Path) -> None:
    """Refuse a processor that makes pictures many times larger than what its model takes."""
    sides = taken if isinstance(taken, list | tuple) else [taken]
    known = [side for side in sides if isinstance(side, int) and side > 0]
    # Convolutions take any size, so a config may have less than its processor; four times as much is another model's.
    most = min(LARGEST_SIDE, max(4 * max(known), 512)) if known else LARGEST_SIDE
    made = [step.target((256, 256)) for step in encode.steps]
    largest = max((side for size in (*made, encode.padded or (0, 0)) for side in size), default=0)
    if largest > most:
        raise UnbackdoorError(
            f"{path} makes pictures of {largest:,} pixels a side, but its model takes {max(known, default=most):,}. "
            "Take the processor that it was trained with, or give --mean, --std and --image-size."
        )


def _lone_file(path: Path) -> UnbackdoorError:
    """A file where a model is expected, and what is to be given instead."""
    program = foreign(path)
    if program is not None:
        return UnbackdoorError(
            f"{path} holds weights for {program}; PyTorch weights are expected. Convert it, or ask its owner for "
            "model.safetensors."
        )
    if (path.parent / "config.json").exists():
        return UnbackdoorError(
            f"{path} holds weights, and the config.json beside it says of what. Give their directory, {path.parent}."
        )
    return UnbackdoorError(
        f"{path} holds weights without an architecture. Give --factory FILE.py:FUNCTION that makes the module."
    )


def _directory_encoder(path: Path, channels: int | None, trust_remote_code: bool = False) -> ImageEncoder:
    """What transformers' AutoImageProcessor would find there."""
    where, content = path / "processor_config.json", None
    if where.exists():
        content = read_json(where, CONFIG).get("image_processor")
    if content is None:
        where = path / "preprocessor_config.json"
        if not where.exists():
            raise UnbackdoorError(f"{path} has no preprocessor_config.json. Give --mean, --std and --image-size.")
        content = read_json(where, CONFIG)
    if not isinstance(content, dict):
        raise UnbackdoorError(f"{where} has an image_processor without fields. Give --mean, --std and --image-size.")
    own = content.get("auto_map")
    if trust_remote_code and isinstance(own, dict) and "AutoImageProcessor" in own:  # else transformers leaves it out
        raise UnbackdoorError(
            f"{where} asks for a processor with Python code of its own, which is not run for pictures. Give --mean, "
            "--std and --image-size instead."
        )
    config = path / "config.json"
    model_type = read_json(config, CONFIG).get("model_type") if config.exists() else None
    return encoder_of(content, channels, str(where), model_type=model_type)


def _recorded_encoder(record: Path) -> ImageEncoder:
    """The encoder that `purify` wrote down; pixels as they are where it wrote none."""
    entries = read_json(record).get("encode") if record.exists() else None
    if entries is None:
        return ImageEncoder()
    try:
        return ImageEncoder(
            mean=tuple(entries["mean"]),
            std=tuple(entries["std"]),
            size=None if entries["size"] is None else sides(entries["size"]),
            channels=entries["channels"],
        )
    except (TypeError, KeyError, ValueError, OverflowError, UnbackdoorError):
        raise UnbackdoorError(
            f"{record} has an encode entry that unbackdoor did not write. Remove it, and give --mean, --std and "
            "--image-size."
        ) from None


@reader("source")
def load_base(source: str | Path, *, factory: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Load the pre-trained model that a suspect came from; a head that it may have is left out.

    Raises:
        UnbackdoorError: anything about the files that does not fit.
    """
    if factory is not None:
        return load(source, factory=factory).model
    made: nn.Module = body(directory_of(source, "--base"), trust_remote_code)
    return made


@reader("source")
def base_encoder(source: str | Path, *, max_length: int | None = None) -> Encoder:
    """The encoder of a model that a victim starts from: an image classifier, or a pre-trained text model.

    Raises:
        UnbackdoorError: anything about the files that does not fit.
    """
    path = directory_of(source, "--base")
    if modality_of(checked_files(path)[0]) == "images":
        return load(path, max_length=max_length).encode
    return text_encoder(path, body(path), max_length)


def save(model: nn.Module, folder: Path, *, source: Path | None = None, encode: Encoder | None = None) -> None:
    """Write a model so that the tool which loaded it loads it again.

    Args:
        model: a Hugging Face model (saved with its config) or any module (`model.safetensors` with its own keys).
        folder: an existing, empty directory.
        source: the Hugging Face directory it came from; its tokenizer or processor files are copied.
        encode: of its inputs; written as a tokenizer or processor where the source has none, or another processor.
    """
    from safetensors.torch import save_file

    if not hasattr(model, "save_pretrained"):
        # Tensors that share memory are written once each: the module's own keys must all be there.
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    with quiet_transformers():
        model.save_pretrained(folder, **_shard_size(source))  # type: ignore[operator]
    if source is not None and source.is_dir():
        copy_companions(source, folder)
    if isinstance(encode, TextEncoder):
        if not (folder / "tokenizer_config.json").exists():
            encode.tokenizer.save_pretrained(folder)
        return
    if encode is not None and not _encodes_alike(folder, encode):
        content = preprocessor_of(encode)
        _write_json(folder / "preprocessor_config.json", content)
        nested = folder / "processor_config.json"
        if nested.exists():  # which goes before the other for transformers
            _write_json(nested, {**read_json(nested), "image_processor": content})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shard_size(source: Path | None) -> dict[str, int]:
    """As an option of `save_pretrained`: where a model came in several files, none is to be longer than those were."""
    shards = (
        [] if source is None else [*source.glob("model-*-of-*.safetensors"), *source.glob("pytorch_model-*-of-*.bin")]
    )
    return {"max_shard_size": max(file.stat().st_size for file in shards)} if shards else {}


def companions(source: Path) -> list[Path]:
    """The files of a Hugging Face directory that belong to a model of it: all but weights and what is not its own.

    Tokenizers and processors have files of any name, so it is told what stays behind: weights of any program, data,
    pictures, archives, logs, what another run of this program wrote, the README (which describes another model), hidden
    files, and folders but for the one of chat templates.

    Raises:
        UnbackdoorError: one of them is a pipe or a device, or cannot be read.
    """
    # Python files lie still unless the reader trusts them, and a model of theirs cannot be read without.
    templates = source / "additional_chat_templates"
    listed = sorted([*source.iterdir(), *(templates.iterdir() if templates.is_dir() else ())])
    return [check_file(file, COMPANION) for file in listed if not file.is_dir() and _is_companion(file)]


def copy_companions(source: Path, folder: Path) -> None:
    """Copy them to a folder with new weights; what is there already stays."""
    for file in companions(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            shutil.copyfile(file, target)


def _is_companion(file: Path) -> bool:
    name = file.name.lower()
    return not (
        file.suffix.lower() in _NO_COMPANIONS
        or name.endswith((".index.json", "_results.json"))
        or name in ("record.json", "attack.json", "stress.json", "trainer_state.json", "readme.md")
        or name.startswith(".")
        or "tfevents" in name
    )


def check_saved(
    folder: Path,
    model: nn.Module,
    encode: Encoder,
    data: Dataset | None,
    *,
    factory: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Load what was written and hold it against what should have been, before anybody is told that it is there.

    Args:
        folder: that was written.
        model: whose weights, kind and classes it must have.
        encode: of inputs, which it must encode alike.
        data: some examples to ask both with; None where there are none.
        factory: see `load`.
        trust_remote_code: see `load`.

    Raises:
        IncompleteError: it cannot be loaded, or is another model.
    """
    try:
        again = load(folder, factory=factory, trust_remote_code=trust_remote_code)
    except UnbackdoorError as problem:
        raise IncompleteError(
            f"The result cannot be loaded again, so nothing was kept: {str(problem).replace(str(folder), 'it')}"
        ) from None
    differing = _difference(Loaded(model, encode), again, data)
    if differing is not None:
        raise IncompleteError(
            f"The result, loaded again, has {differing} than it should have, so nothing was kept. Look at the model's "
            "config.json and its tokenizer or processor."
        )


@torch.no_grad()
def _difference(made: Loaded, again: Loaded, data: Dataset | None) -> str | None:
    """What differs between a model and what was loaded of it; None where nothing does."""
    ours, theirs = made.model.state_dict(), again.model.state_dict()
    if type(made.model).__name__ != type(again.model).__name__:  # a factory defines its classes anew
        return "another class"
    if ours.keys() != theirs.keys() or any(tensor.dtype != theirs[name].dtype for name, tensor in ours.items()):
        return "weights of other names or types"
    if not all(torch.equal(tensor.cpu(), theirs[name]) for name, tensor in ours.items()):
        return "other weights"
    if class_names(made.model) != class_names(again.model):
        return "other names of its classes"
    if data is None:
        return None
    before, after = (probe(each.model, replace(data, encode=each.encode)) for each in (made, again))
    if before.shape != after.shape or not _equal(before, after):
        return "other inputs"
    with evaluating(made.model), evaluating(again.model):
        one, other = logits(made.model, before).float().cpu(), logits(again.model, after).float()
    scale = float(one.abs().max())
    return None if torch.allclose(one, other, rtol=1e-3, atol=1e-3 * scale) else "other answers"


def _equal(one: Inputs, other: Inputs) -> bool:
    if isinstance(one, Tokens) and isinstance(other, Tokens):
        return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name]) for name in one)
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    return torch.allclose(one.cpu(), other, atol=1e-5)


def _encodes_alike(folder: Path, encode: ImageEncoder) -> bool:
    """Whether a directory has a processor already that does what the encoder does."""
    try:
        return _directory_encoder(folder, encode.channels) == replace(encode, done=False)
    except UnbackdoorError:
        return False
