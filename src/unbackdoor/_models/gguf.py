"""GGUF files: language models with quantised weights, read as ordinary ones."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

from unbackdoor._errors import UnbackdoorError, printable
from unbackdoor._inputs import check_file, reading
from unbackdoor._memory import check_memory
from unbackdoor._models.building import Extent, bounded
from unbackdoor._models.hugging_face import quiet_transformers
from unbackdoor._models.untrusted_weights import check_finite
from unbackdoor._models.weight_names import check_fit

# What Llama 3.1 and later ones share.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_SMALLEST = 4  # a weight has at least two bits, so a byte of a file holds at most four
_COPIES = 2  # of each tensor, which transformers makes on the way


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file by its name or, like those of Ollama, by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    check_file(path)
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def gguf_model(path: Path) -> tuple[Any, Any]:
    """Reads the language model and the tokenizer of a GGUF file; weights become float32.

    transformers turns the quantised weights into ordinary ones, but does not save what it read: the result is a fresh
    model with these weights.

    Raises:
        UnbackdoorError: gguf or accelerate is not installed, or transformers cannot read the file.
    """
    import torch
    import transformers

    check_file(path)
    try:
        import accelerate  # noqa: F401  (of `_with_weights_of`)
        from gguf import GGUFReader
    except ImportError as missing:
        raise UnbackdoorError(f'{path} needs {missing.name}; get it with: pip install "unbackdoor[llm]"') from None
    bars = contextlib.redirect_stderr(io.StringIO())  # which transformers shows for these files in any case
    with quiet_transformers(), bars, reading(path):
        try:
            content = GGUFReader(path)
            _check_whole(path, content)
            numbers = [int(tensor.n_elements) for tensor in content.tensors]
            check_memory(
                f"{path} is read as float32, which needs",
                4 * (sum(numbers) + _COPIES * max(numbers, default=0)),
                "Take a machine with more, or give the model as a Hugging Face directory in half precision.",
            )
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
                _scale_positions(path, content, config)
                model = _with_weights_of(read, config)
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


def _with_weights_of(read: Any, config: Any) -> Any:
    """Returns a fresh model that has the weights of another one without a copy of them; its buffers are computed."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    return model


def refuse_part(path: Path) -> None:
    """Refuse a GGUF file that holds no language model, but a part that is put on one.

    Raises:
        UnbackdoorError: it is an adapter, or the part of a model that reads images.
    """
    try:
        from gguf import GGUFReader

        with reading(path):
            kind = str(_field(GGUFReader(path), "general.type", "model"))
    except Exception:  # whatever is wrong with the file is said when it is read as a model
        return
    if kind == "adapter":
        raise UnbackdoorError(
            f"{path} is a LoRA adapter in a GGUF file, which transformers cannot read. Give the PEFT adapter that it "
            "was made of, with `base`; or merge it into its model with llama-export-lora, and give that."
        )
    if kind in ("mmproj", "clip"):
        raise UnbackdoorError(
            f"{path} is the part of a model that reads images (mmproj). Give the GGUF file of its language model."
        )


def _field(content: Any, name: str, otherwise: Any) -> Any:
    return content.fields[name].contents() if name in content.fields else otherwise


def _check_whole(path: Path, content: Any) -> None:
    """Refuse one of several files."""
    count = _field(content, "split.count", 1)
    if count > 1:
        raise UnbackdoorError(
            f"{path} is one of {count} files that hold the model together. Join them with llama-gguf-split, or "
            "give the model as a Hugging Face directory."
        )


def _scale_positions(path: Path, content: Any, config: Any) -> None:
    """Scale the positions of tokens as the file says; transformers leaves that out without a word.

    Args:
        path: the file, for messages.
        content: what it holds.
        config: of the model; changed in place.
    """
    start = f"{_field(content, 'general.architecture', '')}.rope.scaling."
    says = {name.removeprefix(start): _field(content, name, None) for name in content.fields if name.startswith(start)}
    kind, factor = str(says.pop("type", "none")), says.pop("factor", None)
    original = says.pop("original_context_length", None)
    own = getattr(config, "rope_parameters", None)
    by_layer = isinstance(own, dict) and "full_attention" in own  # Gemma, whose own frequencies transformers knows
    named = {} if by_layer else {tensor.name: tensor.data for tensor in content.tensors}
    freqs = named.get("rope_freqs.weight")
    if any(tensor.name.startswith("rope_factors_") for tensor in content.tensors):
        kind = "longrope"
    scaling: dict[str, Any]
    if freqs is not None and (freqs != 1).any():
        kind, scaling = "llama3", _LLAMA3 | {"factor": float(freqs.max())}
    elif kind == "none" or (kind == "linear" and factor in (None, 1)):
        return
    else:
        scaling = {"factor": factor} | ({"original_max_position_embeddings": original} if original else {})
    if scaling["factor"] and isinstance(own, dict) and (kind in ("linear", "llama3") or (kind == "yarn" and not says)):
        scaling = {**own.get("full_attention", own), **scaling, "rope_type": kind}
        config.rope_parameters = {**own, "full_attention": scaling} if by_layer else scaling
        if kind != "llama3" or _has_freqs(config, freqs):
            return
    raise UnbackdoorError(
        f"{path} scales the positions of tokens in a way ({printable(kind)}) that transformers leaves out of a GGUF "
        "file. Give the model as a Hugging Face directory."
    )


def _has_freqs(config: Any, freqs: Any) -> bool:
    """Whether a config divides the frequencies of positions by these numbers."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    plain = config.rope_parameters["rope_theta"] ** -powers
    return len(freqs) == len(scaled) and torch.allclose(
        plain / scaled.double(), torch.tensor(freqs).double(), rtol=1e-3
    )


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
