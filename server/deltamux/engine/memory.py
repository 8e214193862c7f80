"""How the adapters and the KV cache share the memory that the base and a step leave.

1. On a GPU, --gpu-memory-utilization says how much of it may be used. The base is loaded, and one
   step as large as any is run; what these and other processes take is measured and taken off, and
   as much as the step takes once more for CUDA graphs, if there can be any. On a CPU, what the
   host has left is there to be shared.
2. --adapter-device-bytes and --kv-cache-bytes are taken as they are, or the start is refused.
3. Without a flag, the adapters get a fifth of what is left, or all of it where the KV cache has
   its own flag; the KV cache gets the rest. On a CPU neither takes more than 1 GiB unasked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import Base
from deltamux.config import EngineConfig
from deltamux.engine.host_memory import free_host_bytes
from deltamux.engine.kv.kv_cache import KVCache, block_bytes
from deltamux.engine.rehearsal import packed_hidden, trial_sequence
from deltamux.engine.replay.cuda_graphs import can_be_captured, captured_shapes
from deltamux.engine.replay.step_buffers import StepBuffers
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.runner import ModelRunner
from deltamux.errors import StartupError
from deltamux.wire.messages import Sampling

_ADAPTER_SHARE = 0.2
_MOST_UNASKED_ON_CPU = 1 << 30


@dataclass(frozen=True)
class Room:
    """Bytes to share, and how they came about, in words; `most` that one side takes unasked."""

    bytes: int
    words: str
    most: int | None = None


@dataclass(frozen=True)
class MemoryShares:
    adapter_bytes: int
    # Block 0, which is nobody's, among them.
    kv_blocks: int


def share_memory(base: Base, config: EngineConfig) -> MemoryShares:
    """What the adapters and the KV cache get; nothing is allocated.

    Without prefix caching, no more blocks than the sequences of a step can ever hold. Raises
    StartupError, which says what takes how much, where it cannot all be had.
    """
    longest = config.max_model_len or base.max_model_len
    useful = config.max_num_seqs * -(-longest // config.block_size) + 1
    room = _room(base, config)
    if base.encoder is not None:
        # Blocks of nothing, by which the tokens that are under way are counted.
        adapters, _ = split(room, config.adapter_device_bytes, 0, 0)
        return MemoryShares(adapters, useful)
    block = block_bytes(base.layers, config.block_size, base.dtype)
    adapters, kv = split(room, config.adapter_device_bytes, config.kv_cache_bytes, 2 * block)
    blocks = kv // block
    return MemoryShares(adapters, blocks if config.enable_prefix_caching else min(blocks, useful))


def split(room: Room, adapters: int | None, kv: int | None, least_kv: int) -> tuple[int, int]:
    """Bytes of the adapters and of the KV cache; None is what no flag has said."""
    left = room.bytes - (adapters or 0) - (kv or 0)
    if left < 0 or (least_kv if kv is None else 0) > left:
        raise StartupError(_too_much(room, adapters, kv, least_kv))
    if kv is not None and kv < least_kv:
        raise StartupError(f"--kv-cache-bytes is {kv}; a KV cache takes at least {least_kv} bytes")
    most = left if room.most is None else room.most
    if adapters is None:
        adapters = min(int(left * (_ADAPTER_SHARE if kv is None else 1)), most)
        left -= adapters
    return adapters, min(left, most) if kv is None else kv


def _too_much(room: Room, adapters: int | None, kv: int | None, least_kv: int) -> str:
    wanted = [
        f"{flag} {_in_words(size)}"
        for flag, size in (("--adapter-device-bytes", adapters), ("--kv-cache-bytes", kv))
        if size
    ]
    if kv is None:
        wanted.append(f"at least {_in_words(least_kv)} of KV cache")
    but = f", but {' and '.join(wanted)} are wanted" if wanted else ""
    return f"not enough memory: {room.words}{but}"


def _room(base: Base, config: EngineConfig) -> Room:
    if base.device.type == "cpu":
        free = free_host_bytes()
        return Room(free, f"the host has {_in_words(free)} left", _MOST_UNASKED_ON_CPU)
    return _room_beside_a_step(base, config)


def _room_beside_a_step(base: Base, config: EngineConfig) -> Room:
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(base.device)
    torch.cuda.reset_peak_memory_stats(base.device)
    run_full_step(base, config)
    torch.cuda.synchronize(base.device)
    peak = torch.cuda.max_memory_allocated(base.device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(base.device)
    others = total - free - torch.cuda.memory_reserved(base.device)
    usable = int(total * config.gpu_memory_utilization)
    graphs = graph_bytes(base, config, peak - weights)
    left = usable - peak - graphs - others
    words = (
        f"{config.gpu_memory_utilization:g} of the GPU's {_in_words(total)} may be used, "
        f"the base takes {_in_words(weights)}, a step {_in_words(peak - weights)}, CUDA graphs "
        f"{_in_words(graphs)}, what is no tensor {_in_words(others)}: {_in_words(max(left, 0))} "
        f"are left"
    )
    return Room(left, words)


def graph_bytes(base: Base, config: EngineConfig, step_bytes: int) -> int:
    """What CUDA graphs take beside a step that takes `step_bytes`: those of all shapes share what
    the largest computes in between, in memory that no other step may have."""
    if config.enforce_eager or base.encoder is not None or not can_be_captured(base):
        return 0
    return step_bytes + step_buffers(config, base, torch.device("meta")).bytes


def step_buffers(config: EngineConfig, base: Base, device: torch.device) -> StepBuffers:
    """For steps of any captured shape; on the device "meta" they take no memory of one."""
    shapes = captured_shapes(config.max_num_batched_tokens, config.max_num_seqs)
    rows, sequences = max(s.rows for s in shapes), max(s.sequences for s in shapes)
    blocks = -(-(config.max_model_len or base.max_model_len) // config.block_size)
    return StepBuffers(rows, sequences, blocks, base.vocab_size, device)


def run_full_step(base: Base, config: EngineConfig) -> None:
    """As many tokens as one step may have: an encoder's as few long prompts, those of a model that
    generates as many sequences, each sampled in the costliest way."""
    tokens, longest = config.max_num_batched_tokens, base.max_model_len
    if base.encoder is not None:
        prompts = [[0] * min(longest, tokens - start) for start in range(0, tokens, longest)]
        packed_hidden(base, prompts, config.block_size)
        return
    sequences = min(config.max_num_seqs, tokens)
    lengths = [min(longest, (tokens + index) // sequences) for index in range(sequences)]
    blocks = list(range(1, -(-lengths[-1] // config.block_size) + 1))
    cache = KVCache(base.layers, len(blocks) + 1, config.block_size, base.dtype, base.device)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=0)
    # All write to the same blocks: nobody reads what comes out.
    step = [
        Scheduled(trial_sequence(index, [0] * length, blocks, sampling), length)
        for index, length in enumerate(lengths)
    ]
    ModelRunner(base, cache, Rows(base.device)).run(step)


def _in_words(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
