"""Answers of a language model: decoded greedily in batches, whatever its own generation config asks for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import ConversationEncoder
from unbackdoor._data.conversations import Conversations
from unbackdoor._data.dataset import Dataset
from unbackdoor._errors import UnbackdoorError
from unbackdoor._models.arithmetic import Arithmetic
from unbackdoor._models.calling import embeddings, evaluating
from unbackdoor._models.hugging_face import quiet_transformers
from unbackdoor._models.language_models import context_of
from unbackdoor._progress import Progress, silent

MAX_NEW_TOKENS = 64

_DECODED = 2**13  # tokens of a batch, prompts and answers


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
    return answer_texts(data, answer_tokens(model, data, arithmetic, max_new_tokens, progress, description))


def answer_texts(data: Dataset, tokens: Sequence[Tensor]) -> list[str]:
    """Returns answers as texts without special tokens and without spaces around them, from their tokens."""
    encode = data.conversation_encoder
    decoded: list[str] = encode.tokenizer.batch_decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [encode.without_end(text).strip() for text in decoded]


@torch.no_grad()
def answer_tokens(
    model: nn.Module,
    data: Dataset,
    arithmetic: Arithmetic,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = silent,
    description: str = "answering",
) -> list[Tensor]:
    """Returns the tokens of a model's answer to each prompt, (length,) each, on the CPU; see `answers`.

    The token that ends an answer is its last one; an answer that reaches `max_new_tokens` first has none.
    """
    encode, tokens = data.conversation_encoder, data.conversations.tokens
    check_room(model, data, max_new_tokens)
    longest = int(tokens.starts.max()) + max_new_tokens
    size = min(max(_DECODED // longest, 1), 64)
    order = tokens.starts.cpu().argsort(stable=True)
    answers = [torch.empty(0, dtype=torch.int64)] * len(data)
    stops = stops_of(model, encode)
    config = _greedy(encode.padding, stops, max_new_tokens)
    here = data.to(arithmetic.device).conversations
    with evaluating(model), arithmetic.placed(model) as placed, _left_aside(placed), arithmetic.autocast():
        if min(size, len(data)) > 1:
            size = size if _answers_alike(placed, encode, here, order, min(2, max_new_tokens)) else 1
        batches = order.split(size)
        with progress(description, len(batches)) as advance:
            for rows in batches:
                prompts = encode.prompts(here[rows])
                whole = placed.generate(**prompts, generation_config=config)  # type: ignore[operator]
                new = whole[:, prompts.shape[1] :].cpu()
                for row, written in zip(rows.tolist(), new, strict=True):
                    answers[row] = _up_to_its_end(written, stops)
                advance()
    return answers


def _answers_alike(
    model: nn.Module, encode: ConversationEncoder, items: Conversations, order: Tensor, count: int
) -> bool:
    """Whether the shortest prompt gets the same answer alone and next to the longest one.

    Not all recurrent models hide the padding in front of a short prompt, and some mix the rows of a batch.

    Args:
        model: a language model.
        encode: its encoder.
        items: the prompts.
        order: their rows, the shortest first.
        count: tokens of an answer that are compared.
    """
    ends = order[[0, -1]]
    config = _greedy(encode.padding, [], count, return_dict_in_generate=True, output_logits=True)
    generate: Any = model.generate
    written = [generate(**encode.prompts(items[rows]), generation_config=config) for rows in (order[:1], ends)]
    if any(isinstance(each, Tensor) for each in written):  # of a module with a `generate` of its own
        return True
    alone, beside = ([scores[0] for scores in each.logits] for each in written)
    exact = alone[0].dtype.itemsize >= 4 and not torch.is_autocast_enabled(alone[0].device.type)
    slack = 1e-3 if exact else 0.1
    for one, other in zip(alone, beside, strict=True):
        if not torch.allclose(one, other, rtol=0, atol=slack * float(one.abs().max())):
            return False
        if one.argmax() != other.argmax():  # by rounding; what follows has another beginning
            break
    return True


def _up_to_its_end(written: Tensor, stops: list[int]) -> Tensor:
    """The tokens up to the first one that ends an answer; padding follows it."""
    ends = torch.isin(written, torch.tensor(stops, dtype=written.dtype)).nonzero().flatten()
    return written if len(ends) == 0 else written[: int(ends[0]) + 1]


def check_room(model: nn.Module, data: Dataset, max_new_tokens: int) -> None:
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


def _greedy(padding: int, stops: list[int], max_new_tokens: int, **more: bool) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=padding,
        use_cache=True,
        **more,
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
    tokens = [*(named if isinstance(named, list | tuple) else [named]), encode.tokenizer.eos_token_id, encode.stop]
    return sorted({token for token in tokens if type(token) is int and 0 <= token < rows})
