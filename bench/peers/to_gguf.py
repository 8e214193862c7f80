"""Writes the measured model and its adapters as GGUF files, for llama.cpp.

Usage: python to_gguf.py MODEL_FOLDER    makes MODEL_FOLDER/gguf, 0.7 GB, in a few seconds

Needs gguf, numpy and safetensors: `pip install gguf==0.19.0 safetensors`. llama.cpp's own
converters know no tokenizer of one word a token id, so the files are written here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from workload import ADAPTERS, adapter_name

# The parts of a decoder layer, and of what is around the layers.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
AROUND = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_base(folder: Path, config: dict[str, Any], path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_vocabulary(writer, config["vocab_size"])
    for key, weight in load_file(folder / "model.safetensors").items():
        if key in AROUND:
            writer.add_tensor(AROUND[key], weight)
        else:
            module = key.removeprefix("model.").removesuffix(".weight")
            writer.add_tensor(f"{block(module)}.weight", rotary_order(module, weight, config))
    finish(writer)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))])
    writer.add_token_scores([0.0] * size)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (size - 3)])
    writer.add_add_bos_token(False)


def write_adapter(folder: Path, config: dict[str, Any], path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for key, weight in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = key.removeprefix("base_model.model.model.").partition(".lora_")
        if part == "B.weight":
            weight = rotary_order(module, weight, config)
        writer.add_tensor(f"{block(module)}.weight.lora_{part[0].lower()}", weight)
    finish(writer)


def block(module: str) -> str:
    """layers.3.mlp.up_proj is blk.3.ffn_up."""
    _, layer, name = module.split(".", 2)
    return f"blk.{layer}.{NAMES[name]}"


def rotary_order(module: str, weight: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """llama.cpp rotates neighbours, transformers a head's halves: rows of q and k are reordered."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    name = module.rpartition(".")[2]
    if name not in heads:
        return weight
    halves = weight.reshape(config[heads[name]], 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(folder: Path) -> None:
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "gguf").mkdir(exist_ok=True)
    write_base(folder / "base", config, folder / "gguf" / "base.gguf")
    for name in map(adapter_name, range(ADAPTERS)):
        write_adapter(folder / "adapters" / name, config, folder / "gguf" / f"{name}.gguf")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
