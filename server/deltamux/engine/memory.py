"""How many blocks the KV cache may have."""

from __future__ import annotations

import torch

from deltamux.adapters.rows import Rows
from deltamux.base.load import Base
from deltamux.config import EngineConfig
from deltamux.engine.kv_cache import KVCache, block_bytes
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.runner import ModelRunner
from deltamux.engine.sequence import Scheduled
from deltamux.errors import StartupError
from deltamux.wire.messages import Sampling

_CPU_BYTES = 1 << 30


def count_kv_blocks(base: Base, config: EngineConfig) -> int:
    """Blocks that memory affords, block 0 among them; without prefix caching, no more than the
    sequences of a step can ever hold.

    On a GPU it runs one full step, to learn what the model needs beside the cache: everything else
    that will stay on the device, the adapters' arena above all, must be there already.
    Raises StartupError when not even one block fits.
    """
    longest = config.max_model_len or base.max_model_len
    useful = config.max_num_seqs * -(-longest // config.block_size) + 1
    if base.encoder is not None:
        # Blocks of nothing, by which the tokens that are under way are counted.
        return useful
    size = block_bytes(base.layers, config.block_size, base.dtype)
    available = _available_bytes(base, config)
    if available < 2 * size:
        raise StartupError(
            f"{max(available, 0)} bytes are left for the KV cache; one block takes {size}"
        )
    affordable = available // size
    return affordable if config.enable_prefix_caching else min(affordable, useful)


def _available_bytes(base: Base, config: EngineConfig) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if base.device.type == "cpu":
        return _CPU_BYTES
    return _free_beside_a_step(base, config)


def _free_beside_a_step(base: Base, config: EngineConfig) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(base.device)
    run_full_step(base, config)
    torch.cuda.synchronize(base.device)
    free, total = torch.cuda.mem_get_info(base.device)
    elsewhere = total - free - torch.cuda.memory_reserved(base.device)
    peak = torch.cuda.max_memory_allocated(base.device)
    torch.cuda.empty_cache()
    return int(total * config.gpu_memory_utilization) - peak - elsewhere


def run_full_step(base: Base, config: EngineConfig) -> None:
    """As many sequences and tokens as one step may have, each sampled in the costliest way."""
    sequences = min(config.max_num_seqs, config.max_num_batched_tokens)
    length = min(config.max_num_batched_tokens // sequences, base.max_model_len)
    blocks = list(range(1, -(-length // config.block_size) + 1))
    cache = KVCache(base.layers, len(blocks) + 1, config.block_size, base.dtype, base.device)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=0)
    # All write to the same blocks: nobody reads what comes out.
    step = [
        Scheduled(trial_sequence(index, [0] * length, blocks, sampling), length)
        for index in range(sequences)
    ]
    ModelRunner(base, cache, Rows(base.device)).run(step)
