"""Which steps are captured, and what happens where that fails; tests/kernels replays them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs

from deltamux.engine.cuda_graphs import DecodeGraphs, Step, captured_sizes
from deltamux.engine.decode_buffers import DecodeBuffers

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (1000, (1, 2, 4, *range(8, 257, 8))),
    ],
)
def test_sizes_reach_the_largest_step_that_is_worth_it(most: int, sizes: tuple[int, ...]) -> None:
    assert captured_sizes(most) == sizes


@pytest.mark.parametrize("broken", [False, True])
def test_startup_says_what_was_captured_or_that_nothing_can_be(broken: bool) -> None:
    sizes: list[int] = []

    def forward(batch: object, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return torch.zeros(len(rows), 8)

    def capture(step: Step) -> Step:
        step()
        if broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step

    sites = SimpleNamespace(num_slots=2, device=CPU, eager_slots=set(), growth=0)
    graphs = DecodeGraphs((1, 2, 4), forward, DecodeBuffers(4, 4, 8, CPU), sites, capture)
    with capture_logs() as logs:
        assert graphs.capture_base() != broken
    (log,) = logs
    if broken:
        assert sizes == [4] and log["log_level"] == "warning" and "not permitted" in log["error"]
    else:
        assert sizes == [4, 2, 1] and log["rows"] == [1, 2, 4] and log["seconds"] >= 0
