"""What is served and asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from deltamux.bench.workload import Lengths


@dataclass(frozen=True)
class Shape:
    """A base with its adapters, and the load on them."""

    name: str
    # Of LlamaConfig.
    base: dict[str, Any]
    dtype: str
    # Adapter i has rank ranks[i % len(ranks)].
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    # Those asked for in one run; the last is how many there are.
    adapters: tuple[int, ...]
    # Adapters on the device at once.
    slots: int
    # Requests a second, and for how many seconds they arrive.
    rates: tuple[float, ...]
    seconds: float
    prompt_lengths: Lengths
    output_lengths: Lengths
    max_model_len: int
    max_num_seqs: int

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            **self.base,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            dtype=self.dtype,
            architectures=["LlamaForCausalLM"],
        )


LLAMA_8B = Shape(
    name="llama-8b",
    base={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    dtype="bfloat16",
    ranks=(8, 16, 32, 64),
    targets=("q_proj", "v_proj"),
    adapters=(1, 32, 256, 1000),
    slots=64,
    rates=(8.0, 32.0, 96.0),
    seconds=8.0,
    prompt_lengths=Lengths(64, 512),
    output_lengths=Lengths(32, 128),
    max_model_len=2048,
    max_num_seqs=256,
)

TINY = Shape(
    name="tiny",
    base={
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 192,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
    dtype="float32",
    ranks=(8, 16),
    targets=("q_proj", "v_proj"),
    adapters=(1, 6),
    slots=4,
    rates=(5.0, 20.0),
    seconds=1.0,
    prompt_lengths=Lengths(4, 16),
    output_lengths=Lengths(2, 6),
    max_model_len=256,
    max_num_seqs=8,
)
