"""The output matrix of a checkpoint of a language model: its own, its embeddings, or a stored copy of these."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from unbackdoor._mixing.checkpoint import Checkpoint
from unbackdoor._mixing.masks import CHUNK, chunks
from unbackdoor._models.matching import Matching

WORDS = re.compile(r"(word_embeddings|embed_tokens|embed_in|tok_embeddings|wte|embeddings\.tok_embeddings)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.weight$")
_CAUSAL = re.compile("ForCausalLM|LMHeadModel|ForConditionalGeneration")


def output_of(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """Returns the names of the stored output matrix and of the embeddings of a language model; None for each absent."""
    if not _CAUSAL.search(str(checkpoint.directory.config.get("architectures"))):
        return None, None
    found = []
    for pattern in (_OUTPUT, WORDS):
        names = [name for name in checkpoint.shapes if pattern.search(name)]
        found.append(names[0] if len(names) == 1 else None)
    return found[0], found[1]


def stored_copy(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the name of a stored output matrix that is a copy of the embeddings, with theirs; empty without one.

    Files may hold both although the model has only one matrix. As in transformers, they are one if the config ties them
    and all their numbers are equal.
    """
    output, words = output_of(checkpoint)
    if output is None or words is None or not _ties(checkpoint.directory.config):
        return {}
    ours, theirs = checkpoint.tensors[output], checkpoint.tensors[words]
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return {}
    pieces = ((index * CHUNK, min(CHUNK, ours.count - index * CHUNK)) for index in chunks(ours.count))
    same = all(torch.equal(checkpoint.read(output, *piece), checkpoint.read(words, *piece)) for piece in pieces)
    return {output: words} if same else {}


def with_output(matching: Matching, suspect: Checkpoint, base: Checkpoint) -> Matching:
    """The same matching; if the base's output matrix is its embeddings, with the suspect's own output matrix."""
    (ours, _), (theirs, words) = output_of(suspect), output_of(base)
    if ours is None or words is None or not (theirs is None or stored_copy(base)):
        return matching
    return matching.with_output(ours, words, suspect.shapes)


def split(matching: Matching, base: Checkpoint) -> str | None:
    """Returns the name of a base's output matrix that is not its embeddings and has no counterpart; None without."""
    output, words = output_of(base)
    if output is None or words is None or output not in matching.base_only or stored_copy(base):
        return None
    count = min(base.tensors[output].count, CHUNK)
    same = torch.equal(base.read(output, 0, count), base.read(words, 0, count))
    return None if same else output


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the output matrix to the embeddings; without a word, as its kind of model does."""
    part = config.get("text_config")
    for each in (config, part if isinstance(part, Mapping) else {}):
        if isinstance(each.get("tie_word_embeddings"), bool):
            return bool(each["tie_word_embeddings"])
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    return kind in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False))
