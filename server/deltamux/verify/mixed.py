"""One adapter behind the engine's own scheduler, pages and runner, beside requests of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.adapters.task import Call
from deltamux.adapters.traits import Traits
from deltamux.base.load import Base
from deltamux.config import EngineConfig
from deltamux.engine.build import build_runner
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.kv.prefix_pages import PrefixPages
from deltamux.engine.limits import Limits
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.sequence import Scheduled
from deltamux.engine.sequence import Sequence as Request
from deltamux.engine.step.runner import ModelRunner
from deltamux.errors import FailedPrecondition
from deltamux.wire.messages import Classify, Embed, Pooled, Sampling

_BLOCK_SIZE = 16
# Prompts that are longer together are computed in chunks.
_STEP_TOKENS = 256


def generates(base: Base, adapter: Adapter) -> bool:
    """Whether requests of the adapter are for text, and not for scores or an embedding."""
    return base.encoder is None and adapter.task == "generation"


def mixed_answers(base: Base, adapter: Adapter, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """What comes of each prompt with the adapter, then of each without, float32 on the host.

    Logits [tokens, V] where the adapter generates, whose V may be its own. Otherwise embeddings
    [1, width], and with an adapter that has a task head, its logits [1, labels] or
    [tokens, labels]. All of them share the steps. Takes over the base.
    Raises InvalidArgument for a prompt that is too long.
    """
    requests = [
        _request(number, prompt, adapter.digest if number < len(prompts) else "")
        for number, prompt in enumerate([*prompts, *prompts])
    ]
    if not generates(base, adapter):
        for request in requests:
            scored = request.adapter and adapter.head is not None
            request.pooling = Classify() if scored else Embed("mean", normalize=False)
    return _Engine(base, adapter, requests).run()


class _Engine:
    """The engine's parts around one adapter, which always has the only slot."""

    def __init__(self, base: Base, adapter: Adapter, requests: Sequence[Request]) -> None:
        self._traits = adapter.traits
        self._requests = requests
        self._known = base.vocab_size
        rows = Rows(base.device)
        sites = _sites(base, rows, adapter)
        places = [self._traits.virtual.tokens + request.num_prompt for request in requests]
        # The scheduler keeps one in reserve for each sequence that runs.
        num_blocks = sum(-(-count // _BLOCK_SIZE) + 1 for count in places) + 1
        layers = base.layers if base.encoder is None else ()
        cache = KVCache(layers, num_blocks, _BLOCK_SIZE, base.dtype, base.device)
        self._runner = build_runner(base, cache, rows, sites.task_heads)
        prefixes = PrefixPages(sites.prefixes, cache)
        self._blocks = BlockManager(BlockAllocator(num_blocks), _BLOCK_SIZE, prefixes)
        # An encoder reads a prompt in one step.
        step_tokens = _STEP_TOKENS if base.encoder is None else max(_STEP_TOKENS, *places)
        self._scheduler = Scheduler(
            EngineConfig("", max_num_seqs=len(requests), max_num_batched_tokens=step_tokens),
            Limits(
                base.vocab_size,
                base.max_model_len,
                num_blocks * _BLOCK_SIZE,
                generates=base.encoder is None,
            ),
            self._blocks,
            self,
        )

    def run(self) -> list[Tensor]:
        """What comes of each request, in their order."""
        found: list[list[Tensor]] = [[] for _ in self._requests]
        for request in self._requests:
            self._scheduler.add(request)
        while (plan := self._scheduler.schedule(0.0)).scheduled or plan.failed:
            for error in plan.failed.values():
                raise error
            self._step(plan.scheduled, found)
        return [torch.stack(rows) for rows in found]

    def _step(self, scheduled: Sequence[Scheduled], found: list[list[Tensor]]) -> None:
        if isinstance(self._runner, ModelRunner) and scheduled[0].sequence.pooling is None:
            _read_logits(self._runner, scheduled, found, self._known)
        else:
            self._read_pooled(scheduled, found)
        for item in scheduled:
            self._blocks.complete(item.sequence, item.num_tokens)
            if not item.sequence.num_uncomputed:
                self._scheduler.finish(item.sequence)

    def _read_pooled(self, scheduled: Sequence[Scheduled], found: list[list[Tensor]]) -> None:
        yielding = [item.sequence for item in scheduled if item.yields]
        for request, outcome in zip(yielding, self._runner.run(scheduled), strict=True):
            if not isinstance(outcome, Pooled):
                raise FailedPrecondition("what the adapter computes is not finite")
            numbers = torch.frombuffer(bytearray(outcome.numbers), dtype=torch.float32)
            found[request.index] += numbers.view(-1, len(outcome.labels) or len(numbers))

    def acquire(self, digest: str, path: str, call: Call) -> int | None:
        return 0

    def release(self, digest: str) -> None:
        """The adapter stays."""

    def traits(self, digest: str) -> Traits:
        return self._traits

    def tier(self, digest: str) -> str:
        return "device"

    def blocked(self, digest: str) -> bool:
        return False


def _read_logits(
    runner: ModelRunner, scheduled: Sequence[Scheduled], found: list[list[Tensor]], known: int
) -> None:
    batch = runner.batch(scheduled)
    # Not the last row of a prompt alone reaches the head here, but every one.
    batch = replace(batch, sampled_segments=batch.token_segments)
    count, device = len(batch.input_ids), batch.token_segments.device
    logits = runner.forward(batch, torch.arange(count, device=device))
    # The order of the rows is the runner's own; their places in the cache tell them apart.
    row_at = dict(zip(batch.slot_mapping.tolist(), logits.cpu(), strict=True))
    for item in scheduled:
        request, first = item.sequence, item.sequence.num_computed
        size = request.traits.vocab_size or known
        for place in range(max(first, request.virtual.tokens), first + item.num_tokens):
            block, offset = divmod(place, _BLOCK_SIZE)
            row = row_at[request.blocks[block] * _BLOCK_SIZE + offset]
            found[request.index].append(row[:size])


def _sites(base: Base, rows: Rows, adapter: Adapter) -> DeviceSites:
    memory = 2 * adapter.host_bytes + (64 << 20)
    sites = DeviceSites(base.model, base.structure, rows, 1, memory, base.dtype, base.device)
    if not sites.reserve(0, adapter):
        raise FailedPrecondition(f"the adapter does not fit {memory} bytes")
    sites.write(0, adapter)
    return sites


def _request(number: int, prompt: Sequence[int], adapter: str) -> Request:
    request = trial_sequence(number, prompt, [], Sampling())
    # Of its own, so that no block of another one is found: all logits are wanted.
    request.request_id = request.cache_salt = str(number)
    request.adapter = adapter
    return request
