"""Puts an engine together: base, adapters' sites, KV cache, scheduler, loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import structlog
import torch

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.families import FAMILIES
from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.primitives.task_head import TaskHeadBank
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import Base, load_base
from deltamux.base.out_of_memory import is_out_of_memory, memory_for
from deltamux.config import EngineConfig
from deltamux.engine.engine import Engine, NextChore, no_chore
from deltamux.engine.flight import Lazy
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.kv.prefix_pages import PrefixPages
from deltamux.engine.limits import Limits
from deltamux.engine.memory import share_memory, step_buffers
from deltamux.engine.rehearsal import recorded_agree, rehearse, replays_agree
from deltamux.engine.replay.cuda_graphs import (
    GraphCapture,
    StepGraphs,
    can_be_captured,
    captured_shapes,
)
from deltamux.engine.replay.recorded_steps import RecordedSteps
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.step.encoder_runner import EncoderRunner
from deltamux.engine.step.runner import ModelRunner
from deltamux.engine.submission import Submissions
from deltamux.errors import StartupError
from deltamux.store.memory.adapter_cache import AdapterCache
from deltamux.store.memory.loader import Loader
from deltamux.wire.channel import EngineEnd
from deltamux.wire.messages import Ready
from deltamux_kernels import native

_log = structlog.get_logger(__name__)


def build_engine(config: EngineConfig, link: EngineEnd) -> tuple[Engine, Ready]:
    """Loads and tests the base, takes the memory, and returns what is ready to run.

    Raises StartupError when the base or the configuration cannot be served.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    base = load_base(config.model, config.device, config.dtype)
    max_model_len = _max_model_len(config, base)
    with memory_for(f"a step of {config.max_num_batched_tokens} tokens"):
        rehearse(base, config.block_size)
        shares = share_memory(base, config)
    rows = Rows(base.device)
    with memory_for(f"{shares.adapter_bytes} bytes of adapters"):
        sites = _device_sites(config, base, rows, shares.adapter_bytes)
    adapters = _adapter_cache(config, base, sites, link)
    # An encoder keeps nothing of a prompt: its blocks have no pages, and only count.
    layers = base.layers if base.encoder is None else ()
    with memory_for(f"{shares.kv_blocks} blocks of KV cache"):
        cache = KVCache(layers, shares.kv_blocks, config.block_size, base.dtype, base.device)
    prefixes = PrefixPages(sites.prefixes, cache)
    blocks = BlockManager(BlockAllocator(shares.kv_blocks), config.block_size, prefixes)
    limits = Limits(
        base.vocab_size,
        max_model_len,
        blocks.num_total * config.block_size,
        generates=base.encoder is None,
        token_types=base.token_types,
    )
    runner = build_runner(base, cache, rows, sites.task_heads)
    next_chore: NextChore = no_chore
    if isinstance(runner, ModelRunner) and not config.enforce_eager:
        longest = min(max_model_len, shares.kv_blocks * config.block_size)
        next_chore = _replay_steps(runner, config, base, sites, longest)
    beside = computes_beside(base.device)
    engine = Engine(
        link,
        Submissions(limits, config.seed, config.enable_prefix_caching),
        Scheduler(config, limits, blocks, adapters),
        blocks,
        adapters,
        runner if beside else Lazy(runner),
        ahead=beside,
        next_chore=next_chore,
    )
    return engine, _ready(config, base, limits)


def computes_beside(device: torch.device) -> bool:
    """Whether the host is free while the device computes."""
    return device.type != "cpu"


def _max_model_len(config: EngineConfig, base: Base) -> int:
    length = config.max_model_len or base.max_model_len
    if length > base.max_model_len:
        raise StartupError(
            f"--max-model-len is {length}; the model knows {base.max_model_len} positions"
        )
    # An encoder reads a prompt in one step.
    return length if base.encoder is None else min(length, config.max_num_batched_tokens)


def build_runner(
    base: Base, cache: KVCache, rows: Rows, heads: TaskHeadBank
) -> ModelRunner | EncoderRunner:
    """What drives this base; an encoder leaves `cache` alone."""
    if base.encoder is not None:
        return EncoderRunner(base, rows, cache.block_size, heads)
    return ModelRunner(base, cache, rows, heads)


def _replay_steps(
    runner: ModelRunner, config: EngineConfig, base: Base, sites: DeviceSites, longest: int
) -> NextChore:
    """Makes a runner replay its steps of sequences up to so long, if that can be done.

    Returns what there is to capture at rest.
    """
    if base.device.type == "cuda":
        graphs = _step_graphs(runner, config, base, sites, longest)
        if graphs is not None:
            runner.use(graphs)
            return graphs.next_capture
    elif base.dtype == torch.float32 and native.available():
        recorded = RecordedSteps(runner.logits, sites)
        if recorded_agree(recorded, runner, base, longest):
            runner.use(recorded)
    return no_chore


def _step_graphs(
    runner: ModelRunner, config: EngineConfig, base: Base, sites: DeviceSites, longest: int
) -> StepGraphs | None:
    """The base's captured steps; None where none can be had, or they differ from eager ones."""
    if not can_be_captured(base):
        _log.warning(
            "no CUDA graphs: here torch multiplies expert by expert", dtype=str(base.dtype)
        )
        return None
    try:
        graphs = StepGraphs(
            captured_shapes(config.max_num_batched_tokens, config.max_num_seqs),
            runner.logits,
            step_buffers(config, base, base.device),
            sites,
            GraphCapture(base.device),
        )
        usable = graphs.capture_base() and replays_agree(graphs, runner, base, longest)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("no CUDA graphs: there is not enough memory to try them")
        return None
    return graphs if usable else None


def _device_sites(config: EngineConfig, base: Base, rows: Rows, arena: int) -> DeviceSites:
    return DeviceSites(
        base.model,
        base.structure,
        rows,
        config.max_adapter_slots,
        arena,
        base.dtype,
        base.device,
    )


def _adapter_cache(
    config: EngineConfig, base: Base, sites: DeviceSites, link: EngineEnd
) -> AdapterCache:
    beside: Callable[[], AbstractContextManager[None]] = nullcontext
    if base.device.type == "cuda":
        # What is computed of the base's weights is queued beside the steps, not between them.
        beside = partial(torch.cuda.stream, torch.cuda.Stream(base.device))  # type: ignore[no-untyped-call]

    def parse(folder: Path, digest: str) -> Adapter:
        with beside():
            return parse_adapter(folder, digest, base.structure, base.dtype)

    loader = Loader(parse, sites.write, alone=base.device.type == "cpu")
    link.wake_on(loader.fileno())
    return AdapterCache(
        sites, loader, slots=config.max_adapter_slots, host_bytes=config.adapter_host_bytes
    )


def _ready(config: EngineConfig, base: Base, limits: Limits) -> Ready:
    return Ready(
        model=config.model,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        kernel_backend="triton" if base.device.type == "cuda" else "torch",
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        kv_cache_tokens=limits.kv_cache_tokens,
        adapter_slots=config.max_adapter_slots,
        # Several may go by one name: PEFT's LoRA and AdapterHub's.
        families=tuple(sorted({family.name for family in FAMILIES})),
        generates=limits.generates,
        tells_pairs_apart=limits.token_types > 1,
    )
