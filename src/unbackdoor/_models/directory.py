"""`ModelDirectory`: a Hugging Face directory that was checked once, and the parts that can be loaded from it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unbackdoor._data.dataset import Encoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._inputs import COMPANION, CONFIG, check_file, read_json, reader
from unbackdoor._models import classifiers, image_text, language_models
from unbackdoor._models.companions import companions
from unbackdoor._models.config import check_config, check_supported, modality_of, with_class
from unbackdoor._models.hub import directory_of
from unbackdoor._models.image_encoder import image_encoder
from unbackdoor._models.tokenizer import text_encoder, tokenizer_of
from unbackdoor._models.weight_files import WeightFiles, weight_files


@dataclass(frozen=True, eq=False)
class ModelDirectory(os.PathLike[str]):
    """A Hugging Face directory whose files were checked; it can be used as a path: `Path(directory)`.

    Its weights are not in memory: the methods load the model, its tokenizer or its processor.

    Args:
        path: path of the directory; for a model of the Hub, of the local copy.
        config: the content of config.json.
        weights: the files with the weights.
        trust_remote_code: run Python files that come with the model.
    """

    path: Path
    config: Mapping[str, Any]
    weights: WeightFiles
    trust_remote_code: bool = False

    @classmethod
    def at(cls, path: Path, *, trust_remote_code: bool = False) -> "ModelDirectory":
        """Check the files of a directory without loading any.

        Raises:
            UnbackdoorError: a file is missing, damaged, not a regular one, or asks to run code; or the model is not of
                a supported kind.
        """
        _check_directory(path)
        _check_regular(path)
        config = read_json(path / "config.json", CONFIG)
        check_supported(path, config)
        weights = weight_files(path)
        check_config(path, config, weights.extent)
        names = {name for tensors in weights.locations.values() for name in tensors}
        return cls(path, with_class(config, names), weights, trust_remote_code)

    @classmethod
    @reader("source")
    def of(
        cls, source: "str | Path | ModelDirectory", option: str, *, trust_remote_code: bool = False
    ) -> "ModelDirectory":
        """Returns the checked directory of a path or of a Hub model, which is fetched if there is no local copy.

        Args:
            source: path or Hub name; a directory that was already checked is returned.
            option: the option that named it.
            trust_remote_code: see `ModelDirectory`.

        Raises:
            UnbackdoorError: there is no such model; and the errors of `at`.
        """
        if isinstance(source, ModelDirectory):
            return source
        return cls.at(directory_of(source, option, trust_remote_code), trust_remote_code=trust_remote_code)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def modality(self) -> Literal["images", "text", "conversations", "image-text"]:
        """The modality of the model's inputs; of a causal language model, `conversations`."""
        return modality_of(self.config)

    def classifier(self) -> Any:
        """Loads the image or text classifier, in eval mode.

        Raises:
            UnbackdoorError: the weights do not fit it, or are not all finite.
        """
        return classifiers.classifier(self.path, self.config, self.weights, self.trust_remote_code)

    def language_model(self, offload: str | None = None) -> Any:
        """Loads the causal language model, in eval mode; see `language_models.language_model`.

        Raises:
            UnbackdoorError: the weights do not fit it, or are not all finite; or they do not fit into memory.
        """
        return language_models.language_model(self.path, self.weights, self.trust_remote_code, offload)

    def image_text_model(self) -> Any:
        """Loads the model of images and texts, in eval mode.

        Raises:
            UnbackdoorError: the weights do not fit it, or are not all finite.
        """
        return image_text.image_text_model(self.path, self.config, self.weights, self.trust_remote_code)

    def body(self) -> Any:
        """Loads the pre-trained model without a head, in eval mode; see `classifiers.body`.

        Raises:
            UnbackdoorError: the weights do not fit it, or are not all finite.
        """
        return classifiers.body(self.path, self.weights, self.trust_remote_code)

    def fresh_classifier(self, classes: list[str]) -> Any:
        """Loads the pre-trained model with a new head for these classes, in eval mode."""
        return classifiers.fresh_classifier(self.path, self.config, self.weights, classes)

    def tokenizer(self, rows: int | None = None) -> Any:
        """Loads the tokenizer.

        Args:
            rows: number of rows of the model's embeddings, to check the files; None if that is not known.

        Raises:
            UnbackdoorError: there is no tokenizer that transformers can load, or it has no vocabulary.
        """
        return tokenizer_of(self.path, self.trust_remote_code, rows)

    def encoder(
        self, model: Any, *, changes: Mapping[str, Any] | None = None, max_length: int | None = None
    ) -> Encoder:
        """Returns the encoder that makes inputs for a model of this directory.

        Args:
            model: the classifier or the body. If its tokenizer has no padding token, its config gets the one that is
                used.
            changes: for images, fields of `ImageEncoder` that replace those of the processor.
            max_length: for texts, number of tokens that the model reads; None for the most that it can.

        Raises:
            UnbackdoorError: the tokenizer or processor is missing or does not fit the model, or an option is for the
                other kind of model.
        """
        if self.modality != "images":
            if changes:
                raise UnbackdoorError(
                    f"{self.path} reads text; `mean`, `std` and `image_size` are for images. Leave them out."
                )
            return text_encoder(self.path, model, max_length, self.trust_remote_code)
        if max_length is not None:
            raise UnbackdoorError(f"{self.path} takes images; `max_length` is for text models. Leave it out.")
        return image_encoder(self.path, model.config, changes or {}, self.trust_remote_code)

    def companions(self) -> list[Path]:
        """The files that belong to every model made of this one, such as its tokenizer; see `companions`."""
        return companions(self.path)


def _check_directory(path: Path) -> None:
    """Refuse a directory that is not a model's own, and name the directory that is probably meant.

    Raises:
        UnbackdoorError: the directory holds an adapter, or has no config.json.
    """
    if (path / "adapter_config.json").exists():  # it names another model for transformers to load
        raise UnbackdoorError(
            f"{path} holds an adapter (adapter_config.json), not a whole model. Give this directory as the model, and "
            "its base as `base`; in place of another model, merge it into its base (merge_and_unload of peft) and give "
            "the result."
        )
    if os.path.lexists(path / "config.json"):
        return
    trained = [folder for folder in path.glob("checkpoint-*") if _holds_model(folder)]
    if trained:  # the output of a Trainer
        last = max(trained, key=lambda folder: (len(folder.name), folder.name))
        raise UnbackdoorError(
            f"{path} has no config.json, but its checkpoints hold models. Give one of them, such as {last}."
        )
    cached = sorted(
        (folder for folder in path.glob("snapshots/*") if (folder / "config.json").exists()),
        key=lambda folder: folder.stat().st_mtime,
    )
    if cached:  # the folder of a model in the Hub's cache
        raise UnbackdoorError(
            f"{path} is a folder of the Hub's cache, which keeps models under snapshots. Give one of them, such as "
            f"{cached[-1]}."
        )
    inside = sorted(folder for folder in path.glob("*") if _holds_model(folder))
    if inside:  # the result of unpacking an archive, or an adapter that its script gave a name
        raise UnbackdoorError(f"{path} has no config.json, but {inside[0]} holds a model. Give that one.")
    quantised = sorted(path.glob("*.gguf"))
    if quantised:
        raise UnbackdoorError(f"{path} has no config.json, but {quantised[0]} is a GGUF file. Give that one.")
    if (path / "open_clip_config.json").exists():
        raise UnbackdoorError(
            f"{path} is a model of OpenCLIP (open_clip_config.json), which is not read. Give it as a CLIPModel of "
            "transformers, which many of them are to be had as."
        )
    raise UnbackdoorError(
        f"{path} has no config.json. It must be a Hugging Face directory; for other models give `factory`."
    )


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _check_regular(path: Path) -> None:
    """Refuse a directory if a file that would be read or copied is not a regular one, or is too long.

    Raises:
        UnbackdoorError: names the file.
    """
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".txt", ".model", ".py", ".jinja", ".bin", ".safetensors") and not file.is_dir():
            weights = file.suffix in (".bin", ".safetensors")
            check_file(file, None if weights else COMPANION)
