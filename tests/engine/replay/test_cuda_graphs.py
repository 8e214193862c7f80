"""Which steps are captured, and what happens where that fails; tests/kernels replays them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.replay.cuda_graphs import (
    Step,
    StepGraphs,
    can_be_captured,
    captured_shapes,
)
from deltamux.engine.replay.step_buffers import StepBuffers, StepShape
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.batch import StepBatch
from deltamux.wire.messages import Sampling

CPU = torch.device("cpu")
SHAPES = (
    StepShape(1, 1, decodes=True),
    StepShape(2, 2, decodes=True),
    StepShape(4, 2),
    StepShape(8, 2),
)


@pytest.mark.parametrize(
    ("rows", "sequences", "decoding", "mixed"),
    [
        (1, 1, [1], [(1, 1)]),
        (48, 3, [1, 2, 3], [(32, 3), (48, 3)]),
        (100, 20, [1, 2, 4, 8, 16, 20], [(32, 20), (64, 20), (100, 20)]),
        (4, 20, [1, 2, 4], [(4, 4)]),
        (
            9000,
            1000,
            [1, 2, 4, *range(8, 257, 8)],
            [
                (rows, min(rows, 1000))
                for rows in (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
            ],
        ),
    ],
)
def test_shapes_reach_the_largest_step_that_is_worth_it(
    rows: int, sequences: int, decoding: list[int], mixed: list[tuple[int, int]]
) -> None:
    assert captured_shapes(rows, sequences) == (
        *(StepShape(rows, rows, decodes=True) for rows in decoding),
        *(StepShape(rows, sequences) for rows, sequences in mixed),
    )


class Capturing:
    """Of nothing, with an `error` for steps of which so many rows are `refused`."""

    def __init__(
        self, error: Exception | None = None, refused: tuple[int, ...] = (), slots: int = 2
    ) -> None:
        self.rows: list[int] = []
        self._error, self._refused = error, refused
        self.sites = SimpleNamespace(
            num_slots=slots,
            device=CPU,
            eager_slots=set(),
            growth=0,
            added_columns=lambda sampled: 0,
        )
        buffers = StepBuffers(8, 2, 4, 8, CPU)
        self.graphs = StepGraphs(SHAPES, self._forward, buffers, self.sites, self._capture)

    def rest(self) -> list[int]:
        """The rows of what is captured meanwhile."""
        self.rows.clear()
        while capture := self.graphs.next_capture():
            assert len(self.rows) < 9
            capture()
        return self.rows.copy()

    def _forward(self, batch: Any, rows: torch.Tensor) -> torch.Tensor:
        self.rows.append(batch.input_ids.shape[1])
        return torch.zeros(len(rows), 8)

    def _capture(self, step: Step) -> Step:
        step()
        if self.rows[-1] in self._refused:
            assert self._error is not None
            raise self._error
        return step


def test_at_rest_all_steps_with_adapters_are_captured_the_smallest_first() -> None:
    capturing = Capturing()
    assert capturing.graphs.capture_base()
    assert not capturing.rest(), "nobody has an adapter"
    for growth in (1, 2):
        capturing.sites.growth = growth
        assert capturing.rest() == [1, 2, 4, 8]
        assert not capturing.rest()


def test_at_rest_nothing_is_tried_that_was_given_up() -> None:
    capturing = Capturing(RuntimeError("not permitted"), refused=(1,))
    capturing.sites.growth = 1
    assert capturing.rest() == [1, 4, 8]
    capturing.sites.growth = 2
    assert capturing.rest() == [4, 8]


def test_startup_says_what_was_captured() -> None:
    capturing = Capturing()
    with capture_logs() as logs:
        assert capturing.graphs.capture_base()
    (log,) = logs
    assert capturing.rows == [8, 4, 2, 1] and log["seconds"] >= 0
    assert (log["decoding"], log["mixed"]) == ([1, 2], [4, 8])


def test_what_cannot_be_captured_gives_up_all_that_is_like_it() -> None:
    error = RuntimeError("operation not permitted when stream is capturing\nand more")
    with capture_logs() as logs:
        capturing = Capturing(error, refused=(8,))
        assert capturing.graphs.capture_base()
    warning, captured = logs
    assert warning["rows"] == [4, 8] and not warning["decodes"]
    assert warning["error"] == "operation not permitted when stream is capturing"
    assert capturing.rows == [8, 2, 1] and captured["mixed"] == []
    assert not Capturing(error, refused=(8, 4, 2, 1)).graphs.capture_base()


def without_memory() -> Exception:
    """A capture that fails within ends with an error of its own."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), without_memory()])
def test_without_memory_one_shape_is_given_up(error: Exception) -> None:
    capturing = Capturing(error, refused=(8,))
    with capture_logs() as logs:
        assert capturing.graphs.capture_base()
    assert logs[0]["rows"] == [8] and logs[1]["mixed"] == [4]
    assert logs[0]["error"] == "CUDA out of memory"
    assert [shape.rows for shape in capturing.graphs.shapes] == [1, 2, 4]


@pytest.mark.parametrize(
    ("capability", "dtype", "captured"),
    [
        ((8, 0), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, False),
        ((10, 3), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, False),
    ],
)
def test_experts_are_captured_where_the_host_need_not_know_who_was_chosen(
    capability: tuple[int, int],
    dtype: torch.dtype,
    captured: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    structure = SimpleNamespace(experts={"mlp.experts": None})
    base: Any = SimpleNamespace(structure=structure, device=torch.device("cuda"), dtype=dtype)
    assert can_be_captured(base) == captured
    structure.experts.clear()
    assert can_be_captured(base)


@pytest.mark.parametrize(("adapter_from", "replayed"), [(0, True), (1, False)])
def test_too_many_pieces_are_eager(adapter_from: int, replayed: bool) -> None:
    """Two sequences of the one slot, the adapter in the last rows of each."""
    scheduled = []
    for number in range(2):
        sequence = trial_sequence(number, [1, 2], [1 + number], Sampling())
        sequence.slot, sequence.adapter_from = 0, adapter_from
        scheduled.append(Scheduled(sequence, 2))
    step = StepBatch.build(scheduled, 4, CPU)
    assert (Capturing(slots=1).graphs.run(step) is not None) == replayed
