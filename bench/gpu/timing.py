"""CUDA graphs of all layers, replayed in turn: what an arm costs beside the base alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gpu.arms import Arm
from gpu.consumers import consumer
from gpu.plan import Machine
from gpu.weights import SiteWeights


class Layers:
    """The inputs and outputs of the sites, and the order in which a step calls them."""

    def __init__(self, sites: Sequence[SiteWeights], rows: int) -> None:
        self.sites = sites
        self._side = torch.cuda.Stream()
        kinds = {site.shape: consumer(site.shape, rows, sites[0].base) for site in sites}
        self._consumers = [kinds[site.shape] for site in sites]
        like = sites[0].base
        self._x = {site.shape.width: torch.randn(rows, site.shape.width).to(like) for site in sites}
        self._y = {site.base.shape[0]: like.new_empty(rows, site.base.shape[0]) for site in sites}

    def run(self, arm: Arm) -> None:
        """Every site: the base's product, what the arm adds to it, and what the model does next."""
        for number, site in enumerate(self.sites):
            x, y = self._x[site.shape.width], self._y[site.base.shape[0]]
            if arm.beside:
                main = torch.cuda.current_stream()
                self._side.wait_stream(main)
                with torch.cuda.stream(self._side):
                    arm.before(number, x)
                torch.mm(x, site.base.t(), out=y)
                main.wait_stream(self._side)
            else:
                torch.mm(x, site.base.t(), out=y)
                arm.before(number, x)
            arm.after(number, x, y)
            arm.consume(number, y, self._consumers[number])


@dataclass(frozen=True)
class Captured:
    """One replay does the work once. The work owns memory that the graph reads."""

    graph: torch.cuda.CUDAGraph
    work: Callable[[], None]


def capture(work: Callable[[], None]) -> Captured:
    """Kernels are compiled by a run before."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return Captured(graph, work)


def interleaved_medians(steps: Sequence[Captured], seconds: float) -> list[float]:
    """Median milliseconds of a replay of each, in turn for about `seconds`, 7 to 200 times."""
    samples: list[list[float]] = [[] for _ in steps]
    once = sum(_replay(step) for step in steps) / 1e3
    for _ in range(max(7, min(200, int(seconds / max(once, 1e-4))))):
        for step, own in zip(steps, samples, strict=True):
            own.append(_replay(step))
    return [statistics.median(own) for own in samples]


def _replay(step: Captured) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def machine() -> Machine:
    """A copy of 1 GiB and a product of 8192 x 8192 matrices in bfloat16, the best of five."""
    a = torch.randn(1 << 29, device="cuda").to(torch.bfloat16)
    b = torch.empty_like(a)
    left = a[: 1 << 26].view(8192, 8192)
    out = torch.empty_like(left)
    copied = min(_seconds(lambda: b.copy_(a)) for _ in range(5))
    multiplied = min(_seconds(lambda: torch.mm(left, left, out=out)) for _ in range(5))
    return Machine(2 * a.nbytes / copied, 2 * 8192**3 / multiplied)


def _seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
