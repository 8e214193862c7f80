"""The sizes that docs/performance.md tells of an 8B model are those of its shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltamux.base.probe import AttentionLayer
from deltamux.engine.kv.kv_cache import block_bytes

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
RANK = 16
TOKENS = 100_000
LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def test_the_table_of_sizes_is_computed_from_the_shapes():
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_3_1_8B)
    item = torch.bfloat16.itemsize
    base = sum(p.numel() for p in model.parameters()) * item
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    adapter = sum(RANK * (m.in_features + m.out_features) for m in linears) * item
    layers = [AttentionLayer(i, 8, 128, 128, None) for i in range(32)]
    kv = TOKENS * block_bytes(layers, 1, torch.bfloat16)
    rows = [
        f"| {count} | {base / 1e9:.1f} GB | {count * adapter / 1e9:.1f} GB | {kv / 1e9:.1f} GB |"
        f" {(base + count * adapter + kv) / 1e9:.1f} GB |"
        for count in (1, 100, 1000)
    ]
    assert "\n".join(rows) in PAGE.read_text()
