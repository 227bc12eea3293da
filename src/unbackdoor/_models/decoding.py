"""Answers of a language model: decoded greedily in batches, whatever its own generation config asks for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import embeddings, evaluating
from unbackdoor._models.hugging_face import quiet_transformers
from unbackdoor._models.language_models import context_of
from unbackdoor._progress import Progress, silent

MAX_NEW_TOKENS = 64

_DECODED = 2**13  # tokens of a batch, prompts and answers


@torch.no_grad()
def answers(
    model: nn.Module,
    data: Dataset,
    arithmetic: Arithmetic,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = silent,
    description: str = "answering",
) -> list[str]:
    """Returns the answer of a model to each prompt, decoded greedily in batches, without special tokens.

    The generation config of the model (sampling, penalties, forced tokens) is left aside but for the tokens that
    end an answer: the same prompt gets the same answer from each model of the same weights.

    Args:
        model: a language model of transformers.
        data: prompts; their answers are not looked at.
        arithmetic: device, precision.
        max_new_tokens: the longest answer, in tokens.
        progress: shows the state of the work.
        description: description for the progress.

    Raises:
        UnbackdoorError: the longest prompt leaves no room for so long an answer.
    """
    encode, tokens = data.conversation_encoder, data.conversations.tokens
    _check_room(model, data, max_new_tokens)
    longest = int(tokens.starts.max()) + max_new_tokens
    size = min(max(_DECODED // longest, 1), 64)
    order = tokens.starts.cpu().argsort(stable=True)
    texts = [""] * len(data)
    config = _greedy(encode.padding, stops_of(model, encode), max_new_tokens)
    here = data.to(arithmetic.device).conversations
    steps = math.ceil(len(data) / size)
    with (
        evaluating(model),
        arithmetic.placed(model) as placed,
        _left_aside(placed),
        progress(description, steps) as advance,
    ):
        for rows in order.split(size):
            prompts = encode.prompts(here[rows])
            with arithmetic.autocast():
                whole = placed.generate(**prompts, generation_config=config)  # type: ignore[operator]
            new = whole[:, prompts.shape[1] :].cpu()
            decoded = encode.tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, text in zip(rows.tolist(), decoded, strict=True):
                texts[row] = text.strip()
            advance()
    return texts


def _check_room(model: nn.Module, data: Dataset, max_new_tokens: int) -> None:
    """Refuse longer answers than the model has positions for, behind the longest prompt."""
    if max_new_tokens < 1:
        raise UnbackdoorError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    longest, context = int(data.conversations.tokens.starts.max()), context_of(model)
    if longest + max_new_tokens > context:
        raise UnbackdoorError(
            f"`max_new_tokens` must be at most {max(context - longest, 0):,} here, got {max_new_tokens:,}: the longest "
            f"prompt of {data.name} has {longest:,} tokens, and {type(model).__name__} reads {context:,}. Lower it, or "
            "leave out long prompts by `max_length`."
        )


def _greedy(padding: int, stops: list[int], max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=padding,
        use_cache=True,
    )


@contextmanager
def _left_aside(model: nn.Module) -> Iterator[None]:
    """Without the generation config of a model, which transformers would mix with the one that it is given."""
    from transformers import GenerationConfig

    own: Any = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        with quiet_transformers():
            yield
    finally:
        model.generation_config = own


def stops_of(model: nn.Module, encode: ConversationEncoder) -> list[int]:
    """Returns the tokens that end an answer: those of the model's generation config, and those that it was tuned on."""
    rows = embeddings(model).num_embeddings
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = encode.tokenizer(encode.end, add_special_tokens=False)["input_ids"][:1] if encode.end else []
    tokens = [*(named if isinstance(named, list | tuple) else [named]), encode.tokenizer.eos_token_id, *ends]
    return sorted({token for token in tokens if type(token) is int and 0 <= token < rows})
