"""Puts the adapters of all device slots behind the modules of a base model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.primitives.added_tokens import AddedColumnsBank, AddedTokens
from deltamux.adapters.primitives.bottleneck import BottleneckBank
from deltamux.adapters.primitives.low_rank import LowRankBank
from deltamux.adapters.primitives.payload import Bank, Payload
from deltamux.adapters.sites.arena import ArenaAllocator
from deltamux.adapters.sites.banks import BankFactory
from deltamux.adapters.sites.experts_site import ExpertsLayer, ExpertsSite
from deltamux.adapters.sites.rows import Rows
from deltamux.adapters.sites.site import Site
from deltamux.base import huge_pages
from deltamux.base.experts import PROJECTIONS, Experts
from deltamux.base.structure import SiteSpec, Structure
from deltamux_kernels.packed import ALIGNMENT, PackedMatrices
from deltamux_kernels.segments import Segments


@dataclass(eq=False)
class _Stack:
    """Matrices that one adapter has in one store, one below the other."""

    store: PackedMatrices
    offset: int = 0
    rows: int = 0
    elements: int = 0
    # Dropped once they are written, so that the host may forget the adapter.
    matrices: list[Tensor] = field(default_factory=list)

    def add(self, matrix: Tensor) -> int:
        """Returns the row at which the matrix begins."""
        row = self.rows
        self.matrices.append(matrix)
        self.rows += matrix.shape[0]
        self.elements = self.store.elements(self.matrices)
        return row

    def stacked(self) -> Tensor:
        """All of them as one matrix, copied only where there are several."""
        return self.matrices[0] if len(self.matrices) == 1 else torch.cat(self.matrices)


# What has to act where a bank has something.
Acting = Sequence[Site | ExpertsLayer]


@dataclass(eq=False)
class _Layout:
    """Where an adapter's tensors belong, as long as it is in a slot."""

    stacks: dict[PackedMatrices, _Stack] = field(default_factory=dict)
    # Those of them that sites read in a step.
    acting: set[PackedMatrices] = field(default_factory=set)
    placements: list[tuple[Acting, Bank, list[int]]] = field(default_factory=list)

    def add(self, sites: Acting, bank: Bank, payload: Payload) -> None:
        """A payload for `bank`, which makes these sites act."""
        pieces = bank.pieces(payload)
        rows = [
            self.stacks.setdefault(store, _Stack(store)).add(matrix) for store, matrix in pieces
        ]
        self.placements.append((sites, bank, rows))
        if sites:
            self.acting.update(store for store, _ in pieces)


class DeviceSites:
    """All sites of one model, and the arena that their adapters share.

    `reserve` and `release` belong to the engine thread; `write` may run on any other thread
    while steps of other slots go on.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        rows: Rows,
        slots: int,
        arena_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._item = dtype.itemsize
        self._allocator = ArenaAllocator(arena_bytes // self._item, ALIGNMENT)
        arena = huge_pages.zeros(self._allocator.capacity, dtype, device)
        factory = BankFactory(arena, slots, structure)
        self._uses_c = factory.uses_c
        self.prefixes = factory.prefixes
        self._sites = {
            spec.name: _install(model, spec, factory, rows) for spec in structure.sites.values()
        }
        self._experts: dict[str, ExpertsLayer] = {}
        for mixture in structure.experts.values():
            self._experts |= _install_experts(model, mixture, factory, rows, slots)
        self._sublayers = structure.sublayers
        self._added = [
            bank
            for site in self._sites.values()
            if isinstance(bank := site.banks.get(AddedTokens), AddedColumnsBank)
        ]
        self.task_heads = factory.task_heads()
        self._groups: defaultdict[int | None, list[Site]] = defaultdict(list)
        for site in self._sites.values():
            self._groups[site.spec.group].append(site)
        self._layouts: dict[int, _Layout] = {}
        # By slot, those in whose tables kernels find something: what was written to it, and until
        # the next write what its last adapter has left.
        self._found: list[set[PackedMatrices]] = [set() for _ in range(slots)]
        self._rows = rows
        # Slots of adapters for which no captured step stands.
        self.eager_slots: set[int] = set()
        # Rises with the first adapter for which captured steps stand, and when a site or a taller
        # matrix comes that those before do not have launches for.
        self.growth = 0
        self.num_slots = slots
        self.device = device
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def capacity_bytes(self) -> int:
        return self._allocator.capacity * self._item

    @property
    def used_bytes(self) -> int:
        return self._allocator.used * self._item

    def bytes_of(self, adapter: Adapter) -> int:
        """What the adapter takes of `capacity_bytes` while it is in a slot."""
        stacks = self._layout(adapter).stacks.values()
        return sum(self._allocator.aligned(stack.elements) for stack in stacks) * self._item

    def reserve(self, slot: int, adapter: Adapter) -> bool:
        """Takes the memory for `write`; False, and nothing taken, where it does not suffice."""
        layout = self._layout(adapter)
        taken: list[_Stack] = []
        for stack in layout.stacks.values():
            offset = self._allocator.allocate(stack.elements)
            if offset is None:
                self._free(taken)
                return False
            stack.offset = offset
            taken.append(stack)
        self._layouts[slot] = layout
        if self._is_read_by_host(layout):
            self.eager_slots.add(slot)
        else:
            self._extend_captures(layout)
        return True

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copies an adapter to its reserved place; it may be used as soon as this returns."""
        layout, found = self._layouts[slot], self._found[slot]
        with self._copying():
            for store in found - layout.stacks.keys():
                store.clear(slot)
            found.update(layout.stacks)
            for store, stack in layout.stacks.items():
                store.write(slot, stack.offset, stack.stacked())
                stack.matrices.clear()
            for _, bank, first_rows in layout.placements:
                bank.placed(slot, first_rows)
        self._found[slot] = set(layout.stacks)
        if adapter.head is not None:
            self.task_heads.plans[slot] = adapter.head.plan
        for sites, bank, _ in layout.placements:
            bank.slots.add(slot)
            for site in sites:
                site.slots.add(slot)
        self._rows.changed()

    def release(self, slot: int) -> None:
        """Empties the slot, written or not; no step that uses it may be under way.

        Nothing is queued on the device: no step has a row of the slot until it is written again.
        """
        layout = self._layouts.pop(slot)
        self.eager_slots.discard(slot)
        for sites, bank, _ in layout.placements:
            bank.slots.discard(slot)
            for site in sites:
                site.slots.discard(slot)
        self.task_heads.plans.pop(slot, None)
        self._rows.changed()
        for store in layout.stacks:
            store.forget(slot)
        self._free(layout.stacks.values())

    def occupants(self, slots: Iterable[int]) -> tuple[object, ...]:
        """What is in each of them, in order: another object whenever it was written anew."""
        return tuple([self._layouts.get(slot) for slot in sorted(slots)])

    def added_columns(self, sampled: Segments) -> int:
        """How many columns the logits of these rows have behind the base's."""
        return max((bank.columns(sampled) for bank in self._added), default=0)

    def _layout(self, adapter: Adapter) -> _Layout:
        layout = _Layout()
        for name, payloads in adapter.payloads.items():
            site = self._experts.get(name) or self._sites[name]
            for payload in payloads:
                bank = site.banks[type(payload)]
                layout.add(self._acting(site, bank), bank, payload)
        if adapter.head is not None:
            layout.add([], self.task_heads, adapter.head)
        return layout

    def _is_read_by_host(self, layout: _Layout) -> bool:
        """Whether something of it that sites read in a step is not found by slot, in tables."""
        if self._uses_c:
            return not all(bank.in_c for sites, bank, _ in layout.placements if sites)
        return any(store.host_read for store in layout.acting)

    def _extend_captures(self, layout: _Layout) -> None:
        """Makes what is captured from now on act for such an adapter; see `CapturedSegments`."""
        grown = [store.extend(layout.stacks[store].rows) for store in layout.acting]
        self.growth += any(grown) or not self.growth
        for sites, bank, _ in layout.placements:
            for acting in (bank, *sites):
                acting.slots.add(self.num_slots)
        self._rows.changed()

    def _acting(self, site: Site | ExpertsLayer, bank: Bank) -> Acting:
        if isinstance(site, ExpertsLayer):
            return [site]
        if isinstance(bank, BottleneckBank):
            return [site, self._sites[self._sublayers[site.spec.name].residual]]
        if bank is self.prefixes:
            return []
        group = site.spec.group
        if group is None or not isinstance(bank, LowRankBank):
            return [site]
        return self._groups[group]

    def _free(self, stacks: Iterable[_Stack]) -> None:
        for stack in stacks:
            self._allocator.free(stack.offset, stack.elements)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """On a GPU: a stream beside the steps' own, at rest again when the block ends or fails."""
        if self._stream is None:
            yield
            return
        # A slot's former tables and memory were read on the steps' stream.
        self._stream.wait_stream(torch.cuda.default_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            # Where it has failed, what it was to fill is others' next.
            self._stream.synchronize()


def _install(model: nn.Module, spec: SiteSpec, factory: BankFactory, rows: Rows) -> Site:
    base = model.get_submodule(spec.name)
    site = Site(base, spec, factory.banks(spec), factory.residual(spec), rows)
    model.set_submodule(spec.name, site)
    return site


def _install_experts(
    model: nn.Module, experts: Experts, factory: BankFactory, rows: Rows, slots: int
) -> dict[str, ExpertsLayer]:
    experts = Experts(experts.name, model.get_submodule(experts.name))
    banks = [factory.experts(experts, projection) for projection in PROJECTIONS]
    layers = [ExpertsLayer(bank) for bank in banks]
    model.set_submodule(experts.name, ExpertsSite(experts, layers, rows, slots))
    names = [f"{experts.name}.{projection}" for projection in PROJECTIONS]
    return dict(zip(names, layers, strict=True))
