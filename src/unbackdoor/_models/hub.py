"""The Hub: a local copy of a model, without unused files."""

import re
from pathlib import Path

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import check_file, exists

# Weights for other programs, logs, pictures, and folders.
_UNWANTED = (
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.gguf", "*.tflite", "*.pb", "*.pt", "*.pth", "*.ckpt"),
    *("*.pkl", "*.npz", "*.zip", "*.tar*", "*.png", "*.jpg", "*.gif", "*.csv", "*.parquet", "*tfevents*", "*/*"),
)


def directory_of(source: str | Path, option: str, trust_remote_code: bool = False) -> Path:
    """Returns a Hugging Face directory, or the local copy of a Hub model.

    Args:
        source: path or Hub name.
        option: the option that named it.
        trust_remote_code: also fetch the Python files of a Hub model.

    Raises:
        UnbackdoorError: the name is empty, or is not that of a directory; and the errors of `hub_directory`.
    """
    if not str(source):  # for Path, this is the current directory
        raise UnbackdoorError(f"{option} must be a Hugging Face directory or Hub name, got an empty name.")
    path = Path(source)
    if path.is_file():
        raise UnbackdoorError(f"{option} must be a Hugging Face directory or Hub name, got the file {path}.")
    if path.is_dir():
        return path
    if exists(path):  # a pipe or a device
        check_file(path)
    return hub_directory(str(source), trust_remote_code)


def hub_directory(name: str, trust_remote_code: bool = False) -> Path:
    """Returns the local copy of a Hub model, which is fetched if there is none yet.

    Raises:
        UnbackdoorError: there is no such model, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        address = re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", name)
        way_out = f"Give the Hub name, {address[1]}." if address else "Check it."
        raise UnbackdoorError(f"{name} does not exist, and is not a valid Hub name. {way_out}") from None
    try:
        return Path(snapshot_download(name, ignore_patterns=[*_UNWANTED, *["*.py"] * (not trust_remote_code)]))
    except (OSError, RuntimeError, ValueError) as problem:
        reason = printable(str(problem).strip().split("\n")[0].split(". ")[0], 150).rstrip(".")
        answered = isinstance(problem, HfHubHTTPError) and problem.response is not None
        way_out = (
            "Check the name; a private model needs a login (hf auth login)."
            if answered
            else "Check the name; without a network, fetch the model elsewhere and give its directory."
        )
        raise UnbackdoorError(
            f"{name} is neither a local directory nor a model that the Hub offers ({reason}). {way_out}"
        ) from None
