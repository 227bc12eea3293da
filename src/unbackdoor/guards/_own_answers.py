"""Prompts with the answers that a language model gives to them, as batches for a forward pass."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unbackdoor._data.conversation_encoder import UNSCORED, AnswerTokens
from unbackdoor._data.dataset import Batch, Dataset
from unbackdoor._models.calling import embeddings
from unbackdoor._models.decoding import answer_tokens
from unbackdoor._purification.run import Run
from unbackdoor._tasks.generation import Generation

_SCORES = 2**26  # entries of the scores of a batch, (batch, length, vocabulary): 256 MiB in float32


def own_answers(model: nn.Module, inputs: Dataset, run: Run) -> list[Tensor]:
    """Returns the tokens of a model's own answer to each prompt, as it is decoded greedily."""
    assert isinstance(run.task, Generation)
    return answer_tokens(model, inputs, run.arithmetic, run.task.max_new_tokens)


def answered_batches(model: nn.Module, inputs: Dataset, answers: list[Tensor], run: Run) -> Iterator[Batch]:
    """Yields prompts with their answers, of about the same length, on the device of the run.

    The tokens are those that were decoded: an answer that was cut off has no end here either.

    Args:
        model: the language model; it says how many tokens there are, so that a batch stays small.
        inputs: n prompts.
        answers: their answers, n tensors of tokens.
        run: device.
    """
    prompts, device = inputs.conversations.tokens, run.arithmetic.device
    starts = prompts.starts.tolist()
    whole = [
        torch.cat([row[:start].cpu().long(), answer])
        for row, start, answer in zip(prompts.tokens, starts, answers, strict=True)
    ]
    lengths = torch.tensor([len(ids) for ids in whole])
    size = min(max(_SCORES // (int(lengths.max()) * embeddings(model).num_embeddings), 1), 32)
    for rows in lengths.argsort(stable=True).split(size):
        width = int(lengths[rows].max())
        ids = torch.full((len(rows), width), inputs.conversation_encoder.padding)
        for place, row in enumerate(rows.tolist()):
            ids[place, : len(whole[row])] = whole[row]
        places = torch.arange(width)
        inside = places < lengths[rows][:, None]
        answer = inside & (places >= torch.tensor([starts[row] for row in rows.tolist()])[:, None])
        targets = torch.where(answer, ids, torch.full_like(ids, UNSCORED))
        tokens = AnswerTokens({"input_ids": ids, "attention_mask": inside.long()}, targets).to(device)
        yield Batch(tokens, torch.full((len(rows),), -1, device=device), rows)
