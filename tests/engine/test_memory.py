"""How many blocks fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deltamux.base.load import Base, adopt
from deltamux.config import EngineConfig
from deltamux.engine.kv_cache import block_bytes
from deltamux.engine.memory import count_kv_blocks, run_full_step
from deltamux.errors import StartupError


@pytest.fixture(scope="module")
def base() -> Base:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=100,
    )
    return adopt(AutoModelForCausalLM.from_config(config))


def test_bytes_are_the_limit_when_they_are_few(base: Base) -> None:
    size = block_bytes(base.layers, 16, torch.float32)
    assert count_kv_blocks(base, EngineConfig("", kv_cache_bytes=10 * size + 1)) == 10


def test_no_more_blocks_than_the_sequences_can_hold(base: Base) -> None:
    """Seven blocks of 16 hold 100 tokens; one block more is the padding."""
    config = EngineConfig("", max_num_seqs=3, enable_prefix_caching=False)
    assert count_kv_blocks(base, config) == 3 * 7 + 1
    assert count_kv_blocks(base, replace(config, max_model_len=32)) == 3 * 2 + 1


def test_prefix_caching_uses_all_that_there_is(base: Base) -> None:
    size = block_bytes(base.layers, 16, torch.float32)
    config = EngineConfig("", max_num_seqs=1, kv_cache_bytes=50 * size)
    assert count_kv_blocks(base, config) == 50


def test_memory_without_room_for_a_block_is_refused(base: Base) -> None:
    size = block_bytes(base.layers, 16, torch.float32)
    with pytest.raises(StartupError, match="1 bytes are left"):
        count_kv_blocks(base, EngineConfig("", kv_cache_bytes=1))
    with pytest.raises(StartupError, match=f"one block takes {size}"):
        count_kv_blocks(base, EngineConfig("", kv_cache_bytes=2 * size - 1))


@pytest.mark.parametrize(("sequences", "tokens"), [(5, 64), (64, 8), (1, 500)])
def test_full_step_runs_as_wide_as_the_limits_allow(
    base: Base, sequences: int, tokens: int
) -> None:
    rows: list[int] = []
    hook = base.model.model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    run_full_step(base, EngineConfig("", max_num_seqs=sequences, max_num_batched_tokens=tokens))
    hook.remove()
    assert rows == [min(tokens // min(sequences, tokens), 100) * min(sequences, tokens)]
