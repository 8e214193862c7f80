"""What the adapters and the KV cache get of the memory that there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deltamux.base.encoders import Encoder
from deltamux.base.load import Base, adopt
from deltamux.config import EngineConfig
from deltamux.engine import memory
from deltamux.engine.kv.kv_cache import block_bytes
from deltamux.engine.memory import (
    MemoryShares,
    Room,
    graph_bytes,
    run_full_step,
    share_memory,
    split,
    step_buffers,
)
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


def test_flags_are_taken_as_they_are(base: Base) -> None:
    size = block_bytes(base.layers, 16, torch.float32)
    config = EngineConfig("", kv_cache_bytes=10 * size + 1, adapter_device_bytes=12345)
    assert share_memory(base, config) == MemoryShares(12345, 10)


def test_no_more_blocks_than_the_sequences_can_hold(base: Base) -> None:
    """Seven blocks of 16 hold 100 tokens; one block more is the padding."""
    config = EngineConfig("", max_num_seqs=3, enable_prefix_caching=False)
    assert share_memory(base, config).kv_blocks == 3 * 7 + 1
    assert share_memory(base, replace(config, max_model_len=32)).kv_blocks == 3 * 2 + 1


def test_prefix_caching_uses_all_that_there_is(base: Base) -> None:
    size = block_bytes(base.layers, 16, torch.float32)
    config = EngineConfig("", max_num_seqs=1, kv_cache_bytes=50 * size)
    assert share_memory(base, config).kv_blocks == 50


@pytest.mark.parametrize(
    ("adapters", "kv", "shares"),
    [
        (None, None, (200, 800)),
        (300, None, (300, 700)),
        (None, 300, (700, 300)),
        (300, 400, (300, 400)),
        (1000, 0, (1000, 0)),
    ],
)
def test_what_no_flag_says_is_shared(
    adapters: int | None, kv: int | None, shares: tuple[int, int]
) -> None:
    assert split(Room(1000, "1000 are left"), adapters, kv, 0) == shares


def test_a_cpu_gives_neither_more_than_a_gigabyte_unasked() -> None:
    assert split(Room(1000, "", most=150), None, None, 0) == (150, 150)
    assert split(Room(1000, "", most=300), None, None, 0) == (200, 300)
    assert split(Room(1000, "", most=150), 600, None, 0) == (600, 150)


@pytest.mark.parametrize(
    ("adapters", "kv", "wanted"),
    [
        (3, 2, "--adapter-device-bytes 3 GiB and --kv-cache-bytes 2 GiB"),
        (5, None, "--adapter-device-bytes 5 GiB and at least 1 GiB of KV cache"),
        (None, 5, "--kv-cache-bytes 5 GiB"),
        (3.5, None, "--adapter-device-bytes 3.5 GiB and at least 1 GiB of KV cache"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    adapters: float | None, kv: int | None, wanted: str
) -> None:
    def in_bytes(size: float | None) -> int | None:
        return None if size is None else int(size * 2**30)

    with pytest.raises(StartupError) as refused:
        split(Room(4 << 30, "4 GiB are left"), in_bytes(adapters), in_bytes(kv), 1 << 30)
    assert refused.value.message == f"not enough memory: 4 GiB are left, but {wanted} are wanted"


def test_memory_without_room_for_a_block_is_refused(base: Base) -> None:
    size = block_bytes(base.layers, 16, torch.float32)
    with pytest.raises(StartupError, match=f"is 1; a KV cache takes at least {2 * size} bytes"):
        share_memory(base, EngineConfig("", kv_cache_bytes=1))


def test_more_than_the_host_has_is_refused(base: Base) -> None:
    with pytest.raises(StartupError, match=r"the host has .* left, but --kv-cache-bytes 1\.05e"):
        share_memory(base, EngineConfig("", kv_cache_bytes=1 << 50))


def test_an_encoder_gives_the_adapters_all(base: Base) -> None:
    encoder = replace(base, encoder=Encoder(lambda config: None))
    config = EngineConfig("", max_num_seqs=3)
    assert share_memory(encoder, config).kv_blocks == 3 * 7 + 1
    assert share_memory(encoder, replace(config, adapter_device_bytes=99)).adapter_bytes == 99


def test_graphs_take_a_step_and_what_it_reads(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig("", max_num_seqs=3, max_num_batched_tokens=24, max_model_len=40)
    buffers = step_buffers(config, base, torch.device("cpu"))
    assert buffers.block_tables.shape == (4, 3) and buffers.packed.input_ids.shape == (24,)
    assert buffers.bytes > 3 * 64 * 4
    assert graph_bytes(base, config, 1000) == 1000 + buffers.bytes
    assert graph_bytes(base, replace(config, enforce_eager=True), 1000) == 0
    encoder = replace(base, encoder=Encoder(lambda config: None))
    assert graph_bytes(encoder, config, 1000) == 0
    monkeypatch.setattr(memory, "can_be_captured", lambda base: False)
    assert graph_bytes(base, config, 1000) == 0


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
    assert rows == [min(tokens, 100 * sequences)]
