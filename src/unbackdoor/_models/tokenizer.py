"""The tokenizer of a model directory, and the encoder of texts that it makes."""

import importlib.util
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor._data.texts import TextEncoder
from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import COMPANION, MEBIBYTE, check_file, exists, read_json, reading, silent_rust
from unbackdoor._models.calling import embeddings, evaluating
from unbackdoor._models.hugging_face import own_code, quiet_transformers
from unbackdoor._models.recorded import recorded_encode


def text_encoder(path: Path, model: Any, max_length: int | None = None, trust_remote_code: bool = False) -> TextEncoder:
    """Returns the encoder of a text model's directory.

    Args:
        path: the directory.
        model: loaded from it; its config gets the padding token that is used.
        max_length: tokens that the model is to read; None takes the number in its record, or the most that it can.
        trust_remote_code: run Python files that come with the tokenizer.

    Raises:
        UnbackdoorError: there is no tokenizer, or it does not fit the model.
    """
    rows = embeddings(model).num_embeddings
    tokenizer = tokenizer_of(path, trust_remote_code, rows)
    check_rows(path, len(tokenizer), rows)
    check_ids(path, tokenizer, rows)
    padding = getattr(model.config, "pad_token_id", None)
    configured = isinstance(padding, int) and 0 <= padding < len(tokenizer)
    if configured:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)  # decoders find the last token of a text by it
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UnbackdoorError(f"{path} has a tokenizer without a padding token. Set one, and save it again.")
        tokenizer.pad_token = tokenizer.eos_token
    borrowed = not configured and _pad_by_another(tokenizer)
    # XLNet answers at the last token and counts positions from there; padding would move the beginning of other texts.
    tokenizer.padding_side = "left" if model.config.model_type == "xlnet" else "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    parameters = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in parameters]
    most = int(min(longest_of(path, tokenizer), *positions_of(model), 2**20))
    if max_length is not None and max_length > most:
        raise UnbackdoorError(f"`max_length` must be at most {most:,}, which the model can read, got {max_length:,}.")
    if max_length is not None and max_length < 4:
        raise UnbackdoorError(f"`max_length` must be at least 4, got {max_length}.")
    recorded = recorded_encode(path)
    recorded = recorded if isinstance(recorded, dict) else {}
    if max_length is None:
        before = recorded.get("max_length")
        max_length = before if isinstance(before, int) and 4 <= before <= most else most
    columns = tuple(recorded["columns"]) if recorded.get("columns") in (["text"], ["text_a", "text_b"]) else None
    # Models with an encoder and a decoder answer at the last token that ends a text.
    end = getattr(model.config, "eos_token_id", None) if getattr(model.config, "is_encoder_decoder", False) else None
    return TextEncoder(
        tokenizer=tokenizer,
        max_length=max_length,
        columns=columns,
        borrowed_padding=borrowed,
        end=end if isinstance(end, int) else None,
        unpadded=_heeds_padding(model, tokenizer),
    )


@torch.no_grad()
def _heeds_padding(model: Any, tokenizer: Any) -> bool:
    """Whether a model answers otherwise if a text is padded, found by running it on two short texts.

    ConvBERT, YOSO and Nystromformer convolve padding as well, and FNet mixes all tokens without a mask.
    """
    if getattr(model.config, "attention_type", None) == "block_sparse":  # BigBird: a short text changes it for good
        return False
    with reading("the tokenizer of the model"), silent_rust():
        both = tokenizer(["a", "a b c d e f g h i j"], padding=True, return_tensors="pt", return_attention_mask=True)
    count = int(both["attention_mask"][0].sum())
    left = tokenizer.padding_side == "left"
    own = {name: tensor[:1, -count:] if left else tensor[:1, :count] for name, tensor in both.items()}
    try:
        with evaluating(model):
            alone, padded = model(**own).logits[0], model(**both).logits[0]
    except Exception:  # whoever runs it on data says why it fails
        return False
    rounding = max(1e-4, 16 * torch.finfo(alone.dtype).eps) * float(alone.abs().max())
    return float((padded - alone).abs().max()) > rounding


def _pad_by_another(tokenizer: Any) -> bool:
    """Let another token be the padding if the padding token also ends each text; returns whether that was so.

    Decoders answer at the last token that is not padding. A model whose config names no padding answers at the last
    token, whatever it is: with such a padding, it would answer one token earlier.
    """
    with reading("the tokenizer of the model"), silent_rust():
        last = tokenizer("a")["input_ids"][-1:]
        plain = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    other = next((token for token in tokenizer.all_special_tokens if token != tokenizer.pad_token), None)
    borrowed = other is not None and last == [tokenizer.pad_token_id] != plain
    if borrowed:
        tokenizer.pad_token = other
    return borrowed


def longest_of(path: Path, tokenizer: Any) -> float:
    """Returns how many tokens a tokenizer allows; without a limit in its files, a huge number of transformers."""
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise UnbackdoorError(
            f"{path}/tokenizer_config.json must have model_max_length as a number of at least 1, got "
            f"{printable(repr(longest))}. Correct or remove it."
        )
    return longest


def check_rows(path: Path, tokens: int, rows: int) -> None:
    """Refuse a tokenizer with more tokens than the model's embeddings have rows."""
    if tokens > rows:
        raise UnbackdoorError(
            f"{path} has a tokenizer of {tokens:,} tokens, but its model has embeddings for {rows:,}. Take the "
            "tokenizer that it was trained with."
        )


def check_ids(path: Path, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer whose tokens have numbers beyond the embeddings; their count alone does not show that."""
    with reading(f"the tokenizer of {path}"), silent_rust():
        token, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", 0))
        # The numbers of the tokens that are added to a text need not be in the vocabulary.
        around = max(tokenizer("a", "a")["input_ids"], default=0)
        tokenizer("\u4e9c \U0001f9ff zqxj")  # this fails if there is no token for unknown words
    if max(largest, around) >= rows:
        token = token if largest >= around else "one that it adds to a text"
        raise UnbackdoorError(
            f"{path} has a tokenizer whose token {printable(token)} is number {max(largest, around):,}, but its model "
            f"has embeddings for {rows:,}. Take the tokenizer that it was trained with."
        )


def tokenizer_of(path: Path, trust_remote_code: bool = False, rows: int | None = None) -> Any:
    """Loads the tokenizer of a directory.

    Args:
        path: the directory.
        trust_remote_code: run Python files that come with it.
        rows: rows of the model's embeddings, which limit the size of its files; None if that is not known.

    Raises:
        UnbackdoorError: there is none that transformers can load, or it has no vocabulary.
    """
    import transformers

    _check_tokenizer_files(path, rows)
    with quiet_transformers(), silent_rust(), reading(f"the tokenizer of {path}"):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as problem:  # a config decides what runs, so it may be wrong in any way
            if "trust_remote_code" in str(problem):
                raise own_code(path) from None
            raise _unloadable(path, problem) from None
    vocabularies = set(getattr(tokenizer, "vocab_files_names", {}).values()) | {"tokenizer.json"}
    if not any((path / name).exists() for name in vocabularies):  # transformers makes an empty one then
        raise UnbackdoorError(
            f"{path} has a tokenizer without a vocabulary (none of {', '.join(sorted(vocabularies))}). Also "
            "fetch tokenizer.json and tokenizer_config.json."
        )
    return tokenizer


def _unloadable(path: Path, problem: Exception) -> UnbackdoorError:
    """Returns the error for a tokenizer that transformers cannot load, perhaps since a package is missing."""
    reason = printable(str(problem).strip().split("\n")[0], 200).rstrip(".") or type(problem).__name__
    way_out = "Also fetch tokenizer.json and tokenizer_config.json."
    pieces = next((file.name for file in sorted(path.glob("*.model")) if file.name != "tiktoken.model"), None)
    alone = pieces is not None and not (path / "tokenizer.json").exists()
    if alone and importlib.util.find_spec("sentencepiece") is None:
        reason = f"{printable(pieces)} is of SentencePiece, and the package sentencepiece is not installed"
        way_out = "Install it (pip install sentencepiece), or fetch tokenizer.json."
    elif isinstance(problem, ImportError):
        way_out = "Install that package."
    return UnbackdoorError(f"{path} has no tokenizer that transformers can load ({reason}). {way_out}")


def positions_of(model: Any) -> Iterator[int]:
    """Yields numbers of positions of a model, which limit the length of a text."""
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(model.config, name, None)
        if isinstance(limit, int) and limit > 0:
            yield limit
    for name, layer in model.named_modules():
        if "position" in name and isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            yield layer.num_embeddings - layer.padding_idx - 1  # RoBERTa counts from behind the padding token


# Files of tokenizers whose length grows with the number of tokens.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def _check_tokenizer_files(path: Path, rows: int | None) -> None:
    """Refuse tokenizer files that are much too long for the model, name files elsewhere, or make texts much longer."""
    most = COMPANION if rows is None else min(COMPANION, 8 * MEBIBYTE + 2000 * rows)  # 200 bytes a token are many
    for name in (*_VOCABULARIES, *(file.name for file in path.glob("*.model"))):
        if exists(path / name) and not (path / name).is_dir():
            check_file(path / name, most)
    settings = path / "tokenizer_config.json"
    if exists(settings):
        for key, name in read_json(settings, most).items():
            if key.endswith("_file") and isinstance(name, str) and exists(name) and Path(name).parent != path:
                raise UnbackdoorError(
                    f"{settings} names {printable(name)} as its {printable(key)}, a file outside of {path}. Remove "
                    "that entry."
                )
    if exists(path / "tokenizer.json"):
        growth = math.prod(_growths(read_json(path / "tokenizer.json", most).get("normalizer")))
        if growth > 1000:
            raise UnbackdoorError(
                f"{path}/tokenizer.json makes a text up to {growth:,} times as long before it splits it into tokens. "
                "Take the tokenizer that the model was trained with."
            )


def _growths(normalizer: Any) -> Iterator[int]:
    """Yields the factors by which the steps of a tokenizer's normalizer may lengthen a text."""
    if isinstance(normalizer, list):
        for step in normalizer:
            yield from _growths(step)
    elif isinstance(normalizer, dict):
        for key, entry in normalizer.items():
            if key in ("content", "prepend") and isinstance(entry, str):
                yield max(1, len(entry))
            else:
                yield from _growths(entry)
