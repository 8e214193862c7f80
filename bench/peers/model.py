"""Makes what all peers are measured on: a seeded random Llama of 125 M and 32 LoRA adapters.

Usage: python bench/peers/model.py [FOLDER] [bfloat16]

FOLDER is bench/peers/model unless told, ignored by git; 0.8 GB. The adapters are saved in float32,
or in bfloat16.

Every tensor has its own seeded generator, so the weights depend on nothing but their names.
"""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "model"
SEED = 20240
ADAPTERS = 32
RANKS = (4, 8, 16, 32)
CONFIG = LlamaConfig(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=2048,
    vocab_size=32000,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    dtype="float32",
    architectures=["LlamaForCausalLM"],
)


def linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Width in and out of each linear module of a layer."""
    hidden, key_value = config.hidden_size, config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, key_value),
        "self_attn.v_proj": (hidden, key_value),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, config.intermediate_size),
        "mlp.up_proj": (hidden, config.intermediate_size),
        "mlp.down_proj": (config.intermediate_size, hidden),
    }


LINEARS = linears(CONFIG)


def generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def make_base(folder: Path, config: LlamaConfig = CONFIG) -> None:
    """Weights with logits of standard deviation near 1, so that greedy choices are well apart."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        else:
            scale = 1.0 if "embed_tokens" in name else 1.2 / math.sqrt(shape[1])
            weights[name] = torch.randn(shape, generator=generator(name)) * scale
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One word a token id: the peers exchange ids, text only has to be possible."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_adapter(
    index: int,
    folder: Path,
    ranks: tuple[int, ...] = RANKS,
    layers: int = CONFIG.num_hidden_layers,
    linears: dict[str, tuple[int, int]] = LINEARS,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A random adapter on `linears`, its rank one of `ranks` by its index, alpha twice the rank."""
    rank = ranks[index % len(ranks)]
    weights = {}
    for layer in range(layers):
        for linear, (size_in, size_out) in linears.items():
            key = f"base_model.model.model.layers.{layer}.{linear}"
            a = torch.rand(rank, size_in, generator=generator(f"{index}{key}A")) * 2 - 1
            b = torch.randn(size_out, rank, generator=generator(f"{index}{key}B"))
            weights[f"{key}.lora_A.weight"] = (a / math.sqrt(size_in)).to(dtype)
            weights[f"{key}.lora_B.weight"] = (b * 0.03).to(dtype)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[linear.split(".")[1] for linear in linears],
        task_type="CAUSAL_LM",
        base_model_name_or_path="deltamux/bench-125m",
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def make(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Makes what is missing in `folder`: base/ and, in this dtype, adapters/a00 .. a31."""
    if not (folder / "base" / "tokenizer.json").exists():
        print("making the base model", flush=True)
        make_base(folder / "base")
    for index in range(ADAPTERS):
        adapter = folder / "adapters" / f"a{index:02d}"
        if not (adapter / "adapter_model.safetensors").exists():
            print(f"making adapter {adapter.name}", flush=True)
            make_adapter(index, adapter, dtype=dtype)


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    make(Path(given.get(0, FOLDER)), getattr(torch, given.get(1, "float32")))
