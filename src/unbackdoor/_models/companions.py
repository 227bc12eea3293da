"""The files of a model directory that belong to every model made of it, such as its tokenizer or processor."""

import shutil
from pathlib import Path

from unbackdoor._inputs import COMPANION, check_file

# Endings of files in a model's directory that are not copied: weights, data, images, archives, logs.
_NO_COMPANIONS = {
    *(".safetensors", ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".h5", ".keras", ".pb", ".tflite", ".msgpack", ".onnx"),
    *(".onnx_data", ".gguf", ".ot", ".mlmodel", ".npz", ".npy", ".pkl", ".pickle", ".joblib"),
    *(".parquet", ".arrow", ".csv", ".jsonl", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".html"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".log", ".out", ".ipynb", ".sh", ".lock"),
}


def companions(source: Path) -> list[Path]:
    """Returns the files of a Hugging Face directory that belong to every model made of it.

    Tokenizers and processors have files of any name, so these are the files that are left out: weights of any program,
    data, images, archives, logs, files that another run of this program wrote, the README (which describes another
    model), hidden files, and folders except the one of chat templates.

    Raises:
        UnbackdoorError: one of them is a pipe or a device, or cannot be read.
    """
    # Python files only run if the user trusts them, and a model with its own code cannot be loaded without them.
    templates = source / "additional_chat_templates"
    listed = sorted([*source.iterdir(), *(templates.iterdir() if templates.is_dir() else ())])
    return [check_file(file, COMPANION) for file in listed if not file.is_dir() and _is_companion(file)]


def copy_companions(source: Path, folder: Path) -> None:
    """Copy them to a folder with new weights; files that it already has are not replaced."""
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
        or name
        in ("record.json", "attack.json", "stress.json", "trainer_state.json", "adapter_config.json", "readme.md")
        or name.startswith(".")
        or "tfevents" in name
    )
