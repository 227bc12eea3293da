"""GGUF files of small models, written by `gguf` itself as llama.cpp lays them out."""

from collections.abc import Callable
from pathlib import Path

import gguf
import transformers
from tokenizers.pre_tokenizers import ByteLevel

TURNS = ("<|end|>", "<|user|>", "<|assistant|>")
LETTERS = [*sorted(ByteLevel.alphabet()), "th"]
TOKENS = len(LETTERS) + len(TURNS)


def write(
    file: Path,
    model: transformers.LlamaForCausalLM,
    template: str | None = None,
    further: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> None:
    """Write a Llama with tied weights; with a template also a tokenizer of single bytes, of which `th` is one pair.

    Args:
        file: the file.
        model: its weights are written in 32 bits.
        template: the chat template; None leaves out the tokenizer.
        further: adds what else the file is to hold.
    """
    own, sizes = model.state_dict(), model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    writer.add_vocab_size(sizes.vocab_size)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    if template is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*LETTERS, *TURNS])
        writer.add_token_types([gguf.TokenType.NORMAL] * len(LETTERS) + [gguf.TokenType.CONTROL] * len(TURNS))
        writer.add_token_merges(["t h"])
        for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
            add(len(LETTERS))
        writer.add_chat_template(template)
    for name, there in _names(sizes.num_hidden_layers).items():
        weights = own[name].numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp stores the halves of each head interleaved
            heads = sizes.num_attention_heads if "q_proj" in name else sizes.num_key_value_heads
            weights = weights.reshape(heads, 2, -1, sizes.hidden_size).swapaxes(1, 2).reshape(weights.shape)
        writer.add_tensor(there, weights)
    further(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(layers: int) -> dict[str, str]:
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    attention = zip(("q_proj", "k_proj", "v_proj", "o_proj"), ("q", "k", "v", "output"), strict=True)
    parts = {
        **{f"self_attn.{ours}": f"attn_{theirs}" for ours, theirs in attention},
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    }
    for layer in range(layers):
        names |= {
            f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight" for ours, theirs in parts.items()
        }
    return names
