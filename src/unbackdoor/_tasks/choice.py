"""The task of a model, by the encoder of its inputs."""

from typing import Any

from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.dataset import Dataset, Encoder
from unbackdoor._data.pair_encoder import PairEncoder
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.decoding import MAX_NEW_TOKENS
from unbackdoor._progress import Progress, silent
from unbackdoor._tasks.classification import CLASSIFICATION, predict
from unbackdoor._tasks.generation import Generation
from unbackdoor._tasks.image_text import IMAGE_TEXT, classified
from unbackdoor._tasks.task import Task


def refuse_pairs(owner: str, data: Dataset) -> None:
    """Refuse pairs of images and captions where classifiers and language models can be tried.

    Raises:
        UnbackdoorError: the data holds pairs.
    """
    if data.modality == "image-text":
        raise UnbackdoorError(
            f"{owner} tries classifiers and language models, but {data.name} holds pairs for a model of images and "
            "texts. Score that with evaluate."
        )


def answered(model: nn.Module, data: Dataset, arithmetic: Arithmetic) -> Tensor:
    """Returns the class that a model answers for each example, (n,), on the CPU; by prompts if it reads texts as well.

    Args:
        model: a classifier, or a model of images and texts.
        data: images, texts or pairs.
        arithmetic: device, precision, layout.
    """
    return (classified if data.modality == "image-text" else predict)(model, data, arithmetic)


def task_without_data(model: nn.Module) -> Task:
    """Returns the task of a model that comes without any examples, by its output: over a vocabulary, or over classes.

    Args:
        model: the model.
    """
    get: Any = getattr(model, "get_output_embeddings", None)
    return CLASSIFICATION if get is None or get() is None else Generation()


def task_of(encode: Encoder, *, max_new_tokens: int | None = None, progress: Progress = silent) -> Task:
    """Returns the task of the models that an encoder makes inputs for.

    Args:
        encode: as `load` returns it.
        max_new_tokens: the longest answer of a language model, in tokens; None for 64.
        progress: shows the state of the work while a language model answers.

    Raises:
        UnbackdoorError: a classifier is asked for answers of some length.
    """
    if isinstance(encode, ConversationEncoder):
        return Generation(MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens, progress)
    if max_new_tokens is not None:
        raise UnbackdoorError(
            "`max_new_tokens` is for language models; a classifier answers with a class. Leave it out."
        )
    if isinstance(encode, PairEncoder):
        return IMAGE_TEXT
    return CLASSIFICATION
