"""Steps as CUDA graphs: captured at fixed shapes, replayed for any sequences and adapters.

There are shapes of steps that only decode, and of those in which prompts take part. There are two
sets of each. That without adapters is captured at startup. That with them has launches for
whatever an adapter ever had; each shape is captured while the engine rests, or else when a step
first wants it, and again when adapters have outgrown it. All other steps run eagerly: those that
are larger than any shape, those of which hidden states are wanted, and those with an adapter that a
captured step does not stand for, or with rows of adapters in more pieces than it has tiles for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import monotonic

import structlog
import torch
from torch import Tensor

from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.base.load import Base
from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.engine.replay.step_buffers import ShapedStep, StepBuffers, StepShape
from deltamux.engine.step.batch import StepBatch
from deltamux.engine.step.replays import Forward
from deltamux.errors import first_line
from deltamux_kernels.expert_linear import is_one_launch

_log = structlog.get_logger(__name__)

# Beyond these, a step computes for longer than its launches take.
_LARGEST_DECODING = 256
# Up to 256 rows a step is as long as it takes to read the base. Beyond, at most a third is padding.
_MIXED = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)

# Queues the work of a step whose inputs and outputs stay in the same memory.
Step = Callable[[], None]
# Runs a step, and makes one of it that repeats its launches.
Capture = Callable[[Step], Step]


def can_be_captured(base: Base) -> bool:
    """False where every step of the base waits for the device: for what its routers have chosen."""
    return not base.structure.experts or is_one_launch(base.device, base.dtype)


def captured_shapes(most_rows: int, most_sequences: int) -> tuple[StepShape, ...]:
    """For steps of up to so many rows and sequences; of those that hold a step, the best first."""
    most_sequences = min(most_sequences, most_rows)
    decoding = _up_to(most_sequences, (1, 2, 4, *range(8, _LARGEST_DECODING + 1, 8)))
    mixed = _up_to(most_rows, _MIXED)
    return (
        *(StepShape(rows, rows, decodes=True) for rows in decoding),
        *(StepShape(rows, min(rows, most_sequences)) for rows in mixed),
    )


def _up_to(most: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    most = min(most, sizes[-1])
    return (*(size for size in sizes if size < most), most)


class GraphCapture:
    """Captures one graph after another, which share the memory of what is computed in between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        try:
            return self._captured(step)
        except Exception as error:
            if not is_out_of_memory(error):
                # Up to torch 2.12, no other capture may use the pool of one that was broken off.
                self._pool = torch.cuda.graph_pool_handle()
            raise

    def _captured(self, step: Step) -> Step:
        graph, steps = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(steps)
        try:
            # Around both, since a capture that fails leaves its own stream the current one.
            with torch.cuda.stream(self._stream):
                step()  # kernels are compiled, libraries take their workspaces
                # The loader's threads go on meanwhile.
                with torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ):
                    step()
        finally:
            # What was queued before it failed reads the buffers that the next step fills.
            steps.wait_stream(self._stream)
        return graph.replay


@dataclass(frozen=True)
class _Captured:
    replay: Step
    # What was captured: a replay reads memory that it owns.
    step: Step
    # Of the sites, when it was captured.
    growth: int
    # Logits of tokens that adapters add, behind those of the base's, [sequences, A].
    added: Tensor


class StepGraphs:
    """The captured steps of one runner."""

    def __init__(
        self,
        shapes: tuple[StepShape, ...],
        forward: Forward,
        buffers: StepBuffers,
        sites: DeviceSites,
        capture: Capture,
    ) -> None:
        """A step is replayed with the first of `shapes` that holds it; `buffers` are for all."""
        self._forward = forward
        self._sites = sites
        self._capture = capture
        self._steps = {shape: ShapedStep(shape, buffers, sites) for shape in shapes}
        # By shape, and whether with adapters.
        self._captured: dict[tuple[StepShape, bool], _Captured] = {}
        self._given_up: set[tuple[StepShape, bool]] = set()

    @property
    def shapes(self) -> list[StepShape]:
        """Those of which a step without adapters is captured."""
        return [shape for shape in self._steps if (shape, False) in self._captured]

    @torch.inference_mode()
    def capture_base(self) -> bool:
        """Captures the steps without adapters; False where not one could be."""
        started = monotonic()
        # The largest first: the others find its memory free.
        for shape in sorted(self._steps, key=lambda shape: -shape.rows):
            if (shape, False) not in self._given_up:
                self._try(shape, adapted=False)
        shapes = self.shapes
        if shapes:
            _log.info(
                "captured CUDA graphs",
                decoding=[shape.rows for shape in shapes if shape.decodes],
                mixed=[shape.rows for shape in shapes if not shape.decodes],
                seconds=round(monotonic() - started, 1),
            )
        return bool(shapes)

    def run(self, step: StepBatch) -> Tensor | None:
        """Logits [S, W], float32, until the next call; None for a step that is not replayed."""
        if step.pooled or not step.token_segments.slots.isdisjoint(self._sites.eager_slots):
            return None
        adapted = bool(step.token_segments)
        shape = next((shape for shape in self._steps if shape.holds(step)), None)
        if shape is None or (shape, adapted) in self._given_up:
            return None
        shaped = self._steps[shape]
        if not shaped.fill(step):
            return None
        captured = self._find(shape, adapted) or self._try(shape, adapted)
        if captured is None:
            return None
        captured.replay()
        logits, rows = shaped.logits, len(step.sampled)
        columns = self._sites.added_columns(step.sampled_segments)
        if not columns:
            return logits[:rows]
        return torch.cat((logits[:rows], captured.added[:rows, :columns]), dim=1)

    def next_capture(self) -> Callable[[], None] | None:
        """Captures a step with adapters before it is wanted; None where none is missing.

        The smallest first: when an engine at rest is asked for something, few ask at once.
        """
        if not self._sites.growth:
            return None
        missing = [
            shape
            for shape in self._steps
            if (shape, True) not in self._given_up and self._find(shape, adapted=True) is None
        ]
        shape = min(missing, key=lambda shape: shape.rows, default=None)
        return None if shape is None else partial(self._capture_for_nobody, shape)

    @torch.inference_mode()
    def _capture_for_nobody(self, shape: StepShape) -> None:
        # What the last step has left would write to blocks that may be others' by now.
        self._steps[shape].clear()
        self._try(shape, adapted=True)

    def _find(self, shape: StepShape, adapted: bool) -> _Captured | None:
        """What was captured, unless adapters have outgrown it."""
        captured = self._captured.get((shape, adapted))
        outgrown = captured is not None and adapted and captured.growth < self._sites.growth
        return None if outgrown else captured

    def _try(self, shape: StepShape, adapted: bool) -> _Captured | None:
        """Captures a step of what the buffers hold."""
        if (shape, adapted) in self._captured:
            # What is outgrown gives its memory back first; a step under way may still replay it.
            if self._sites.device.type == "cuda":
                torch.cuda.synchronize(self._sites.device)
            del self._captured[shape, adapted]
        started, growth = monotonic(), self._sites.growth
        try:
            step, added = self._step(shape, adapted)
            captured = _Captured(self._capture(step), step, growth, added)
        except Exception as error:
            self._give_up(shape, adapted, error)
            return None
        self._captured[shape, adapted] = captured
        if adapted:
            _log.info(
                "captured a CUDA graph with adapters",
                rows=shape.rows,
                decodes=shape.decodes,
                seconds=round(monotonic() - started, 2),
            )
        return captured

    def _give_up(self, shape: StepShape, adapted: bool, error: Exception) -> None:
        """This shape, where memory did not suffice; for any other reason all that are like it."""
        causes = [*_causes(error)]
        starved = any(map(is_out_of_memory, causes))
        lost = [
            other
            for other in self._steps
            if other == shape or (not starved and other.decodes == shape.decodes)
        ]
        self._given_up |= {(other, adapted) for other in lost}
        _log.warning(
            "cannot capture a CUDA graph, such steps run without",
            rows=[other.rows for other in lost],
            decodes=shape.decodes,
            adapters=adapted,
            error=first_line(causes[-1]),
        )

    def _step(self, shape: StepShape, adapted: bool) -> tuple[Step, Tensor]:
        """And where it puts the logits of added tokens."""
        shaped = self._steps[shape]
        inputs, logits = shaped.inputs(adapted), shaped.logits
        columns = self._sites.added_columns(inputs.sampled_segments)
        known, added = logits.shape[1], logits.new_zeros(shape.sequences, columns)

        def step() -> None:
            given = self._forward(inputs, inputs.sampled_rows)
            logits.copy_(given[:, :known])
            added.copy_(given[:, known:])

        return step, added


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in whose handling it came: a failed capture ends with one of its own."""
    while error is not None:
        yield error
        error = error.__context__
