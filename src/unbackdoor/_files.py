"""Model files: load a suspect of any kind, and write what came of it for the tool that loaded it."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from unbackdoor._checkpoints import check_finite, check_safetensors, read_weights
from unbackdoor._errors import UnbackdoorError
from unbackdoor._images import ImageEncoder
from unbackdoor._processor import encoder_of, preprocessor_of, sides


class Loaded(NamedTuple):
    """A model and the encoder that makes its inputs."""

    model: nn.Module
    encode: ImageEncoder


def load(
    source: str | Path,
    *,
    factory: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
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
    if image_size is not None and image_size < 1:
        raise UnbackdoorError(f"--image-size must be at least 1, got {image_size}.")
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
        return Loaded(_from_factory(path, factory), replace(recorded, **changes))
    if path.is_file():
        raise UnbackdoorError(
            f"{path} holds weights without an architecture. Give --factory FILE.py:FUNCTION that makes the module."
        )
    if not path.is_dir():
        path = hub_directory(str(source), trust_remote_code)
    model = _from_directory(path, trust_remote_code)
    channels = getattr(model.config, "num_channels", None)
    try:
        encode = _directory_encoder(path, channels)
    except UnbackdoorError:
        if None in (mean, std, image_size):
            raise
        encode = ImageEncoder(channels=channels)
    if image_size is not None:
        changes |= {"shortest_edge": None, "crop": None}
    return Loaded(model, replace(encode, **changes))


def _directory_encoder(path: Path, channels: int | None) -> ImageEncoder:
    preprocessor = path / "preprocessor_config.json"
    if not preprocessor.exists():
        raise UnbackdoorError(f"{path} has no preprocessor_config.json. Give --mean, --std and --image-size.")
    return encoder_of(_json(preprocessor), channels, str(preprocessor))


def _recorded_encoder(record: Path) -> ImageEncoder:
    """The encoder that `purify` wrote down; pixels as they are where it wrote none."""
    entries = _json(record).get("encode") if record.exists() else None
    if entries is None:
        return ImageEncoder()
    try:
        return ImageEncoder(
            mean=tuple(entries["mean"]),
            std=tuple(entries["std"]),
            size=None if entries["size"] is None else sides(entries["size"]),
            channels=entries["channels"],
        )
    except (TypeError, KeyError, ValueError, UnbackdoorError):
        raise UnbackdoorError(
            f"{record} has an encode entry that unbackdoor did not write. Remove it, and give --mean, --std and "
            "--image-size."
        ) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise UnbackdoorError(f"{path} is not valid JSON ({problem}). Fetch it again.") from None
    if not isinstance(content, dict):
        raise UnbackdoorError(f"{path} must hold a JSON object, got {type(content).__name__}. Fetch it again.")
    return content


def make(factory: str) -> nn.Module:
    """The module of `FILE.py:FUNCTION`."""
    file, _, function = factory.rpartition(":")
    if not file or not function:
        raise UnbackdoorError(f"--factory must be FILE.py:FUNCTION, got {factory}.")
    if not Path(file).is_file():
        raise UnbackdoorError(f"--factory names {file}, which does not exist.")
    spec = importlib.util.spec_from_file_location("_unbackdoor_factory", file)
    if spec is None or spec.loader is None:
        raise UnbackdoorError(f"--factory names {file}, which is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    beside = str(Path(file).resolve().parent)
    sys.path.insert(0, beside)  # the file may import its neighbours, as a script may
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise UnbackdoorError(f"{file} has no function {function}. --factory is FILE.py:FUNCTION.")
        made = getattr(module, function)()
    except UnbackdoorError:
        raise
    except Exception as problem:  # the file is the user's own program
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:300].rstrip(". ")
        raise UnbackdoorError(
            f"--factory {factory} failed ({reason}). The function must make the module without arguments."
        ) from problem
    finally:
        sys.path.remove(beside)
    if not isinstance(made, nn.Module):
        raise UnbackdoorError(f"{factory} must return a torch.nn.Module, got {type(made).__name__}.")
    return made


def _from_factory(path: Path, factory: str) -> nn.Module:
    model = make(factory)
    weights = read_weights(path)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        (name, tuple(weights[name].shape), tuple(own[name].shape))
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    _check_fit(str(path), factory, missing, extra, sorted(shapes))
    model.load_state_dict(weights)
    return model.eval()


def _check_fit(path: str, owner: str, missing: list[str], extra: list[str], shapes: list[tuple[str, Any, Any]]) -> None:
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensor(s) ({_few(missing)})")
    if extra:
        problems.append(f"has {len(extra)} that it does not know ({_few(extra)})")
    if shapes:
        name, came, wanted = shapes[0]
        problems.append(f"has {len(shapes)} of another shape ({name} is {tuple(came)}, not {tuple(wanted)})")
    if problems:
        raise UnbackdoorError(f"{path} does not fit {owner}: it {' and '.join(problems)}. Check the architecture.")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def hub_directory(name: str, trust_remote_code: bool = False) -> Path:
    """The local copy of a Hub model, fetched where it is not there yet.

    Raises:
        UnbackdoorError: there is no such model, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UnbackdoorError(f"{name} does not exist, and is no name that the Hub could know. Check it.") from None
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns + ["*.py"] * trust_remote_code))
    except (OSError, RuntimeError, ValueError) as problem:
        reason = str(problem).strip().split("\n")[0][:150].rstrip(".")
        raise UnbackdoorError(
            f"{name} is neither a directory here nor a model that the Hub gives out ({reason}). Check the name."
        ) from None


def _from_directory(path: Path, trust_remote_code: bool) -> Any:
    """A Hugging Face directory, its files checked before transformers sees them."""
    if not (path / "config.json").exists():
        raise UnbackdoorError(
            f"{path} has no config.json. It must be a Hugging Face directory; for other models give --factory."
        )
    config = _json(path / "config.json")
    kernel = next(_kernels(config), None)
    if kernel is not None:
        raise UnbackdoorError(f"{path} asks to run the code {kernel}; it was not loaded. Remove it from config.json.")
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        kind = str(config["problem_type"]).replace("_", " ").replace("multi label", "multi-label")
        raise UnbackdoorError(f"{path} is a model for {kind}; only single-label classifiers are supported.")
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    elif index.exists():
        listed = _json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(part, str) for part in listed.values()):
            raise UnbackdoorError(f"{index} does not say which file holds which tensor. Fetch it again.")
        files = [path / part for part in sorted(set(listed.values()))]
        for file in files:
            if file.parent != path or not file.is_file():
                raise UnbackdoorError(f"{path} lists the shard {file.name}, which is missing. Fetch it again.")
    elif (path / "pytorch_model.bin").exists():
        read_weights(path / "pytorch_model.bin")
        files = []
    else:
        raise UnbackdoorError(f"{path} has no model.safetensors (nor pytorch_model.bin). Fetch it again.")
    for file in files:
        check_safetensors(file)

    import transformers

    from unbackdoor import archs

    archs.register()
    with _quiet_transformers():
        try:
            model, report = transformers.AutoModelForImageClassification.from_pretrained(
                str(path),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=bool(files),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
            )
        except Exception as problem:  # a config decides what runs, so it may be wrong in any way
            if "trust_remote_code" in str(problem):
                raise UnbackdoorError(
                    f"{path} needs Python code of its own, which is not run. Pass --trust-remote-code if you trust it."
                ) from None
            reason = str(problem).strip().split("\n")[0][:200].rstrip(".") or type(problem).__name__
            raise UnbackdoorError(
                f"{path} is not an image classifier that transformers can load ({reason}). Check its config.json."
            ) from None
    shapes = sorted((entry[0], entry[1], entry[2]) for entry in report["mismatched_keys"])
    absent = sorted(set(report["missing_keys"]) - {entry[0] for entry in shapes})
    _check_fit(str(path), type(model).__name__, absent, sorted(report["unexpected_keys"]), shapes)
    check_finite(model.state_dict(), str(path))
    return model.eval()


def _kernels(config: Any) -> Iterator[str]:
    """Code on the Hub that a config names as an implementation, at any depth: these names have a slash."""
    for key, entry in config.items() if isinstance(config, dict) else ():
        implementations = entry.values() if isinstance(entry, dict) else [entry]
        if "implementation" in key:
            yield from (str(each) for each in implementations if "/" in str(each))
        yield from _kernels(entry)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bar and report off stderr, and put its settings back."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def save(model: nn.Module, folder: Path, *, source: Path | None = None, encode: ImageEncoder | None = None) -> None:
    """Write a model so that the tool which loaded it loads it again.

    Args:
        model: a Hugging Face model (saved with its config) or any module (`model.safetensors` with its own keys).
        folder: an existing, empty directory.
        source: the Hugging Face directory it came from; its processor files are copied.
        encode: of its inputs; written as a processor where the source has none, or another.
    """
    from safetensors.torch import save_file

    if not hasattr(model, "save_pretrained"):
        # Tensors that share memory are written once each: the module's own keys must all be there.
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    with _quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    own = {"config.json", "generation_config.json"}
    for file in sorted(source.iterdir()) if source is not None and source.is_dir() else []:
        # Python files lie still unless the reader trusts them, and a model of theirs cannot be read without.
        copied = (
            file.suffix in (".json", ".txt", ".model", ".py")
            and "index" not in file.name
            and file.name != "record.json"
        )
        if copied and file.name not in own and not file.name.startswith("attack"):
            shutil.copyfile(file, folder / file.name)
    processor = folder / "preprocessor_config.json"
    if encode is not None and not (processor.exists() and _encodes_alike(processor, encode)):
        processor.write_text(json.dumps(preprocessor_of(encode), indent=2) + "\n", encoding="utf-8")


def _encodes_alike(processor: Path, encode: ImageEncoder) -> bool:
    try:
        return _directory_encoder(processor.parent, encode.channels) == encode
    except UnbackdoorError:
        return False
