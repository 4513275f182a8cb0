"""Tiny GGUF files made of tiny models, as llama.cpp's converter writes them."""

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from tests.tiny import CHAT_TEMPLATE

if TYPE_CHECKING:
    from gguf import GGUFWriter

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SPECIAL = ["<unk>", "<bos>", "<eos>"]


def build_tiny_gguf(
    file: Path,
    model_dir: Path,
    *,
    architecture: str = "llama",
    rope_scaling: str | None = None,
    without: str = "",
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """The model's weights as they are, with a byte-level tokenizer of as many tokens. architecture: as the file says
    it. without: a tensor that is left out. extra: more tensors."""
    from gguf import GGUFWriter

    config = json.loads((model_dir / "config.json").read_text())
    writer = GGUFWriter(file, architecture)
    _write_shape(writer, config)
    if rope_scaling is not None:
        writer.add_string(f"{architecture}.rope.scaling.type", rope_scaling)
    _write_tokenizer(writer, config["vocab_size"])
    tensors = {gguf_name(name): tensor for name, tensor in load_file(model_dir / "model.safetensors").items()}
    for name, tensor in {**tensors, **(extra or {})}.items():
        if name == without:
            continue
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = interleaved(tensor, config["head_dim"])
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor, by transformers'."""
    stem, _, kind = name.rpartition(".")
    if stem in OTHER_NAMES:
        return f"{OTHER_NAMES[stem]}.{kind}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{BLOCK_NAMES[part]}.{kind}"


def interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a projection with the two halves of each head in turns, as llama.cpp rotates Llama's. weight:
    [heads * head_dim, hidden]."""
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _write_shape(writer: "GGUFWriter", config: dict[str, int]) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: "GGUFWriter", vocab_size: int) -> None:
    """ASCII, and pairs of letters."""
    tokens = [*SPECIAL, *map(chr, range(ord("!"), ord("~") + 1)), "\u0120", "\u010a"]
    pairs = [*product("abcdefgh", repeat=2)][: vocab_size - len(tokens)]
    tokens += ["".join(pair) for pair in pairs]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (vocab_size - len(SPECIAL)))  # control, normal
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
