"""Decode steps as CUDA graphs: captured at fixed sizes, replayed for any sequences and adapters.

There are two sets. That without adapters is captured at startup. That with them has launches for
whatever an adapter ever had; each size is captured when a step first wants it, and again when
adapters have outgrown it. All other steps run eagerly: prompts, mixed steps, steps that are larger
than the largest size, and those with an adapter that a captured step does not stand for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import structlog
import torch
from torch import Tensor

from deltamux.adapters.sites import DeviceSites
from deltamux.engine.batch import StepBatch
from deltamux.engine.decode_buffers import DecodeBuffers
from deltamux_kernels import CapturedSegments, Segments

_log = structlog.get_logger(__name__)

# Beyond it, a step computes for longer than its launches take.
_LARGEST = 256

# Queues the work of a step whose inputs and outputs stay in the same memory.
Step = Callable[[], None]
# Runs a step, and makes one of it that repeats its launches.
Capture = Callable[[Step], Step]
# Logits [rows, V], float32, of the given rows of a step.
Forward = Callable[[StepBatch, Tensor], Tensor]


def captured_sizes(most: int) -> tuple[int, ...]:
    """Rows of the captured steps, for steps of up to `most` rows."""
    most = min(most, _LARGEST)
    return (*(size for size in (1, 2, 4, *range(8, most, 8)) if size < most), most)


class GraphCapture:
    """Captures one graph after another, which share the memory of what is computed in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Around both, since a capture that fails leaves its own stream the current one.
        with torch.cuda.stream(self._stream):
            step()  # kernels are compiled, libraries take their workspaces
            # The loader's threads go on meanwhile.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                step()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph.replay


@dataclass(frozen=True)
class _Captured:
    replay: Step
    # What was captured: a replay reads memory that it owns.
    step: Step
    # Of the sites, when it was captured.
    growth: int


class DecodeGraphs:
    """The captured steps of one runner."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        forward: Forward,
        buffers: DecodeBuffers,
        sites: DeviceSites,
        capture: Capture,
    ) -> None:
        """`sizes` ascend; `buffers` are for the last of them."""
        self.sizes = sizes
        self._forward = forward
        self._buffers = buffers
        self._sites = sites
        self._capture = capture
        self._nobody = Segments.build((), sites.device)
        self._adapted = {
            size: CapturedSegments(
                CapturedSegments.capacity_for(size, sites.num_slots), sites.num_slots, sites.device
            )
            for size in sizes
        }
        # By size, and whether with adapters.
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._given_up: set[bool] = set()

    @torch.inference_mode()
    def capture_base(self) -> bool:
        """Captures the steps without adapters; False for a model that cannot be captured."""
        started = monotonic()
        # The largest first: the others find its memory free.
        captured = all(self._try(size, adapted=False) for size in reversed(self.sizes))
        if captured:
            seconds = round(monotonic() - started, 1)
            _log.info("captured CUDA graphs", rows=list(self.sizes), seconds=seconds)
        return captured

    def run(self, step: StepBatch) -> Tensor | None:
        """Logits [T, V], float32, until the next call; None for a step that is not replayed."""
        rows, segments = step.input_ids.shape[1], step.token_segments
        if rows > self.sizes[-1] or rows > len(step.sampled):
            return None
        if not segments.slots.isdisjoint(self._sites.eager_slots):
            return None
        size, adapted = self.sizes[bisect_left(self.sizes, rows)], bool(segments)
        self._buffers.fill(step, size)
        if adapted:
            assert self._adapted[size].fill(segments)
        captured = self._find(size, adapted)
        if captured is None:
            return None
        captured.replay()
        return self._buffers.logits[:rows]

    def _find(self, size: int, adapted: bool) -> _Captured | None:
        captured = self._captured.get((size, adapted))
        if captured is None or (adapted and captured.growth < self._sites.growth):
            return self._try(size, adapted)
        return captured

    def _try(self, size: int, adapted: bool) -> _Captured | None:
        """Captures a step of what the buffers hold, unless that has failed before."""
        # What is outgrown gives its memory back first.
        self._captured.pop((size, adapted), None)
        if adapted in self._given_up:
            return None
        started, growth = monotonic(), self._sites.growth
        try:
            step = self._step(size, adapted)
            captured = _Captured(self._capture(step), step, growth)
        except Exception as error:
            self._given_up.add(adapted)
            _log.warning(
                "cannot capture a CUDA graph, such steps run without",
                rows=size,
                adapters=adapted,
                error=f"{type(error).__name__}: {error}",
            )
            return None
        self._captured[size, adapted] = captured
        if adapted:
            seconds = round(monotonic() - started, 2)
            _log.info("captured a CUDA graph with adapters", rows=size, seconds=seconds)
        return captured

    def _step(self, size: int, adapted: bool) -> Step:
        batch = self._buffers.batch(size, self._adapted[size] if adapted else self._nobody)
        logits = self._buffers.logits[:size]

        def step() -> None:
            logits.copy_(self._forward(batch, batch.sampled_rows))

        return step
