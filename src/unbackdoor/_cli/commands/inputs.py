"""The outputs and inputs that options name: directories, models, data."""

import logging
from pathlib import Path
from typing import Any

from unbackdoor._artifacts import directories
from unbackdoor._cli.options import (
    AttackOptions,
    AuditOptions,
    EvaluateOptions,
    GuardFitOptions,
    GuardRunOptions,
    ModelOptions,
    PurifyOptions,
    StressOptions,
    TrainOptions,
)
from unbackdoor._data.dataset import Augment, Dataset
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._models import loading
from unbackdoor._models.adapters import is_adapter, needs_merging
from unbackdoor._poisoning.attack_file import victim_of

logger = logging.getLogger("unbackdoor")


def free_place(
    out: str,
    inputs: tuple[str | None, ...],
    options: PurifyOptions | AttackOptions | StressOptions | AuditOptions | GuardFitOptions | TrainOptions,
) -> tuple[Path, directories.Content | None]:
    """Returns the directory to write, and the content that an earlier run left there.

    Raises:
        UnbackdoorError: the name is empty; or the directory exists, or is or holds an input; see
            `directories.check_free`.
    """
    if not options.out:  # for Path, this is the current directory
        raise UnbackdoorError("--out must be the name of a directory, got an empty one.")
    paths = _paths(inputs, options)
    return Path(out), directories.check_free(Path(out), overwrite=options.overwrite, inputs=paths)


def free_file(
    file: str, option: str, inputs: tuple[str | None, ...], options: AuditOptions | GuardRunOptions, mark: str
) -> Path:
    """Returns the file to write.

    Raises:
        UnbackdoorError: the name is empty; or the file cannot be written or replaced; see
            `directories.check_free_file`.
    """
    if not file:  # for Path, this is the current directory
        raise UnbackdoorError(f"--{option} must be the name of a file, got an empty one.")
    paths = _paths(inputs, options)
    directories.check_free_file(Path(file), option, overwrite=options.overwrite, inputs=paths, mark=mark)
    return Path(file)


def _paths(inputs: tuple[str | None, ...], options: Any) -> tuple[Path, ...]:
    """Returns what is read: the inputs that are given, and the files that options of the model name."""
    factory = getattr(options, "factory", None) or ""
    named = (factory.rpartition(":")[0], getattr(options, "prompts", None))
    return tuple(Path(each) for each in (*inputs, *named) if each)


def load_model(source: str, options: ModelOptions, *, merge: bool = False) -> loading.Loaded:
    """Loads a model with these options; an adapter is put on its base, or added to it.

    Only `purify` writes one, so that the others add what is more than an adapter of low rank without being asked.

    To be scored alone, a language model need not fit into memory.
    """
    base = base_of(source, options)
    judged = base is not None and not isinstance(options, PurifyOptions)
    return loading.load(
        source,
        factory=options.factory,
        mean=_comma_separated("mean", options.mean),
        std=_comma_separated("std", options.std),
        image_size=options.image_size,
        max_length=options.max_length,
        template=options.template,
        prompts=options.prompts,
        base=base,
        merge=merge or (judged and needs_merging(Path(source))),
        offload=(options.device or "auto") if isinstance(options, EvaluateOptions) else None,
        trust_remote_code=options.trust_remote_code,
    )


def base_of(source: str, options: ModelOptions) -> str | None:
    """Returns --base if MODEL is an adapter, which needs it to be loaded; other models are whole."""
    adapted = Path(source).is_dir() and is_adapter(Path(source))
    return getattr(options, "base", None) if adapted else None


def load_control(source: str | None, options: ModelOptions | None = None) -> loading.Loaded | None:
    """Loads the model that --control names with the options of MODEL; warns if it was poisoned."""
    if source is None:
        return None
    attacked = victim_of(Path(source))
    if attacked is not None:
        logger.warning(
            "--control must be a model that was never poisoned, but %s is a victim of %s, so its flips do not measure "
            "a clean model. Train one with attack none.",
            source,
            attacked,
        )
    return loading.load(source) if options is None else load_model(source, options)


def load_dataset(
    path: str,
    encode: Any,
    options: ModelOptions,
    classes: tuple[str, ...] | None,
    augment: Augment = "none",
    labelled: bool = True,
    unread: dict[int, str] | None = None,
) -> Dataset:
    """Reads examples for a model, with the column names of the options; `unread` as in `Dataset.load`."""
    columns = column_names(options.columns)
    settings: dict[str, Any] = {"augment": augment, "labelled": labelled, "unread": unread}
    return Dataset.load(path, encode, columns=columns, classes=classes, **settings)


def show_first_prompt(data: Dataset) -> None:
    """Show the user how prompts are rendered, by the first of them; nothing for other data."""
    if data.modality == "conversations":
        first = data.conversation_encoder.texts(data.conversations[:1])[0]
        logger.info(
            "%s: prompts are rendered by the %s template; the first one is %s",
            data.name,
            data.conversation_encoder.template,
            printable(repr(first), 500),
        )


def column_names(text: str | None) -> dict[str, str] | None:
    """Returns the data's column names by the library's, from --columns."""
    if text is None:
        return None
    pairs = [part.split("=") for part in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UnbackdoorError(f"--columns must read OURS=NAME,OURS=NAME, as in image=img,label=fine_label, got {text}.")
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise UnbackdoorError(f"--columns must name each of our columns once, got {text}. Leave one out.")
    return columns


def no_classes() -> UnbackdoorError:
    """Returns the refusal of prompts of classes for a model that reads no texts besides images."""
    return UnbackdoorError(
        "`prompts` are the texts of the classes of a model of images and texts: give one as --base, or leave them out."
    )


def _comma_separated(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UnbackdoorError(f"--{option} must be numbers with commas between, got {text}.") from None


def factory_name(factory: str | None) -> str | None:
    """Returns FILE.py:FUNCTION without the folder of the file."""
    return None if factory is None else Path(factory.rpartition(":")[0]).name + ":" + factory.rpartition(":")[2]
