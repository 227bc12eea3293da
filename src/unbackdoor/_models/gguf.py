"""GGUF files: language models with quantised weights, read as ordinary ones."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import check_file, reading
from unbackdoor._models.building import Extent, bounded
from unbackdoor._models.hugging_face import quiet_transformers
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._models.weight_names import check_fit

_SMALLEST = 4  # a weight has at least two bits, so a byte of a file holds at most four


def gguf_model(path: Path) -> tuple[Any, Any]:
    """Reads the language model and the tokenizer of a GGUF file; weights become float32.

    transformers turns the quantised weights into ordinary ones, but does not save what it read: the result is a fresh
    model with these weights.

    Raises:
        UnbackdoorError: the package gguf is not installed, or transformers cannot read the file.
    """
    import torch
    import transformers

    check_file(path)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UnbackdoorError(f'{path} needs gguf; get it with: pip install "unbackdoor[llm]"') from None
    bars = contextlib.redirect_stderr(io.StringIO())  # which transformers shows for these files in any case
    with quiet_transformers(), bars, reading(path):
        try:
            content = GGUFReader(path)
            extent = Extent(_SMALLEST * path.stat().st_size, len(content.tensors), None)
            source = {"gguf_file": path.name, "local_files_only": True}
            with bounded(path.parent, extent):
                read, report = transformers.AutoModelForCausalLM.from_pretrained(
                    path.parent, dtype=torch.float32, output_loading_info=True, **source
                )
                check_fit(str(path), type(read).__name__, sorted(report["missing_keys"]), [], [])
                _check_blocks(path, content, read.config)
                config = copy.deepcopy(read.config)
                if hasattr(config, "quantization_config"):
                    del config.quantization_config
                model = type(read)(config)
            model.load_state_dict(read.state_dict())
            model.generation_config = read.generation_config
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
            if "tokenizer.ggml.tokens" in content.fields:
                _leave_out_others(tokenizer, len(content.fields["tokenizer.ggml.tokens"].data))
        except UnbackdoorError:
            raise
        except Exception as problem:  # a damaged file may fail in any way
            reason = printable(str(problem).strip().split("\n")[0], 200).rstrip(".") or type(problem).__name__
            raise UnbackdoorError(
                f"{path} is not a GGUF file that transformers can read ({reason}). Fetch it again, or give the "
                "model as a Hugging Face directory."
            ) from None
    check_finite(model.state_dict(), str(path))
    return model.float().eval(), tokenizer


def _check_blocks(path: Path, content: Any, config: Any) -> None:
    """Refuse a file with other blocks than its header says: transformers leaves them out without a word."""
    stored = {tensor.name.split(".")[1] for tensor in content.tensors if tensor.name.startswith("blk.")}
    count = getattr(config, "num_hidden_layers", len(stored))
    if len(stored) != count:
        raise UnbackdoorError(
            f"{path} has tensors of {len(stored):,} blocks, but its header says {count:,}. Fetch it again."
        )


def _leave_out_others(tokenizer: Any, count: int) -> None:
    """Take out the tokens that transformers adds behind those of the file, since the model has no embeddings for them.

    Args:
        tokenizer: changed in place.
        count: number of tokens of the file.
    """
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in content["added_tokens"] if token["id"] < count]
    if len(kept) < len(content["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**content, "added_tokens": kept}))
