"""Ways to add the adapters' products of one site to what the base has put there, and to go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from deltamux_kernels import CapturedSegments, Segments, Slice
from deltamux_kernels.expand import expand_triton
from deltamux_kernels.expand_slices import expand_slices_triton
from deltamux_kernels.shrink import SPLIT_ROWS, shrink_triton
from gpu.consumers import Consumer
from gpu.fused import Delta
from gpu.shapes import Step
from gpu.weights import SiteWeights


class Arm(Protocol):
    """One way. `before` may run beside the base's product, `after` runs when y holds it."""

    # Whether `before` reads only x, so that a second stream may run it.
    beside: bool

    def before(self, site: int, x: torch.Tensor) -> None: ...

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None: ...

    def consume(self, site: int, y: torch.Tensor, consumer: Consumer) -> tuple[torch.Tensor, ...]:
        """What the model computes from y."""


class Nothing:
    """The base alone."""

    beside = False

    def before(self, site: int, x: torch.Tensor) -> None:
        return

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        return

    def consume(self, site: int, y: torch.Tensor, consumer: Consumer) -> tuple[torch.Tensor, ...]:
        return consumer.plain(y)


class Deltamux(Nothing):
    """Packed by rank. `form` is one of plan.FORMS; `capacity`: the grid of a graph for any mix."""

    def __init__(
        self,
        sites: Sequence[SiteWeights],
        step: Step,
        form: str,
        *,
        capacity: bool = False,
        beside: bool = False,
        split_rows: int = SPLIT_ROWS,
        spans: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        """`spans`: of other rows than the step's."""
        self.beside, self._split_rows = beside, split_rows
        self._sites, self.form = sites, form
        device = sites[0].base.device
        self._segments = Segments.build(step.spans if spans is None else spans, device)
        slots = len(step.ranks)
        tiles = CapturedSegments.capacity_for(step.rows, slots)
        if capacity:
            captured = CapturedSegments(tiles, slots, device)
            for store in (store for site in sites for store in (site.a, *site.bs)):
                store.extend(store.most_rows(range(slots)))
            captured.fill(self._segments)
            self._segments = captured
        self._products: dict[int, torch.Tensor] = {}

    def before(self, site: int, x: torch.Tensor) -> None:
        self._products[site] = shrink_triton(
            x, self._sites[site].a, self._segments, self._split_rows
        )

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        weights, h = self._sites[site], self._products.pop(site)
        slices = [
            Slice(part, b, columns)
            for part, b, columns in zip(
                y.split(weights.shape.outputs, 1), weights.bs, weights.columns, strict=True
            )
        ]
        if self.form == "site":
            expand_slices_triton(slices, h, self._segments)
        else:
            for part in slices:
                expand_triton(part.y, h, part.b, part.columns, self._segments)


class Fused(Deltamux):
    """The expand of a site inside what reads its outputs."""

    def __init__(self, sites: Sequence[SiteWeights], step: Step, *, beside: bool = False) -> None:
        super().__init__(sites, step, "fused", beside=beside)
        nobody = len(step.ranks)
        everyone = [*step.spans, (nobody, step.rows - step.bare, step.rows)]
        self._tiles = Segments.build(everyone, sites[0].base.device).tiles

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        return

    def consume(self, site: int, y: torch.Tensor, consumer: Consumer) -> tuple[torch.Tensor, ...]:
        weights, h = self._sites[site], self._products.pop(site)
        return consumer.fused(y, Delta(h, weights.bs, weights.columns, self._tiles))


class CublasLoop(Nothing):
    """Two matrix products an adapter and a slice."""

    def __init__(self, sites: Sequence[SiteWeights], step: Step) -> None:
        self._sites, self._step = sites, step

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        weights = self._sites[site]
        parts = y.split(weights.shape.outputs, 1)
        for part, a, b in zip(parts, weights.padded_a, weights.padded_b, strict=True):
            for slot, start, end in self._step.spans:
                rank = self._step.ranks[slot]
                h = torch.mm(x[start:end], a[slot, :rank].t())
                part[start:end].addmm_(h, b[slot, :, :rank].t())


class GroupedMM(Nothing):
    """torch's grouped products, every adapter padded to the largest rank."""

    def __init__(self, sites: Sequence[SiteWeights], step: Step) -> None:
        self._sites = sites
        ends = [end for _, _, end in step.spans]
        self._ends = torch.tensor(ends, dtype=torch.int32, device=sites[0].base.device)

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        weights = self._sites[site]
        parts = y.split(weights.shape.outputs, 1)
        for part, a, b in zip(parts, weights.padded_a, weights.padded_b, strict=True):
            h = torch.nn.functional.grouped_mm(x, a.transpose(1, 2), offs=self._ends)
            part += torch.nn.functional.grouped_mm(h, b.transpose(1, 2), offs=self._ends)


Arms = dict[str, Callable[[], Arm]]


def own_arms(sites: Sequence[SiteWeights], step: Step) -> Arms:
    """deltamux in its forms, and what torch has; the base alone comes first."""

    def deltamux(form: str, **options: Any) -> Callable[[], Arm]:
        return lambda: Deltamux(sites, step, form, **options)

    arms: Arms = {
        "base alone": Nothing,
        "deltamux, apart": deltamux("apart"),
        "deltamux, site": deltamux("site"),
        "deltamux, site, graph for any mix": deltamux("site", capacity=True),
    }
    if step.phase == "decode":
        arms["deltamux, site, beside the base"] = deltamux("site", beside=True)
        arms["deltamux, fused, beside the base"] = lambda: Fused(sites, step, beside=True)
    else:
        arms["deltamux, site, K not split"] = deltamux("site", split_rows=0)
    arms["deltamux, fused"] = lambda: Fused(sites, step)
    # A graph of more products than this takes longer to capture than to tell.
    if len(step.ranks) <= 32:
        arms["cuBLAS loop"] = lambda: CublasLoop(sites, step)
    arms["torch grouped_mm"] = lambda: GroupedMM(sites, step)
    return arms
