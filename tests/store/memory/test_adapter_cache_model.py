"""AdapterCache against a model of plain dicts: leases, slots, bytes, order of eviction, pins."""

from __future__ import annotations

import select
import tempfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from deltamux.adapters.traits import PLAIN, Traits
from deltamux.errors import FailedPrecondition
from deltamux.store.digest import content_digest
from deltamux.store.memory.adapter_cache import AdapterCache
from deltamux.store.memory.loader import Loader

SLOTS, DEVICE_BYTES, HOST_BYTES = 3, 60, 80

_root = tempfile.TemporaryDirectory()


def _folder(number: int) -> Path:
    folder = Path(_root.name) / str(number)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(str(number))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


# Digest -> folder, and what the adapter is said to take on host and device.
FOLDERS = {content_digest(folder): str(folder) for folder in map(_folder, range(7))}
SIZES = {digest: 10 * (1 + number % 4) for number, digest in enumerate(FOLDERS)}

digests = st.sampled_from(list(FOLDERS))


@dataclass(frozen=True)
class FakeAdapter:
    """Bytes and no tensors."""

    digest: str
    family: str = "fake"
    rank: int = 1
    parameters: int = 1
    note: str = ""
    task: str = "generation"
    head: None = None
    traits: Traits = PLAIN

    @property
    def host_bytes(self) -> int:
        return SIZES[self.digest]


class FakeSites:
    """An arena without fragmentation; every misuse of a slot is an assertion."""

    capacity_bytes = DEVICE_BYTES

    def __init__(self) -> None:
        self.reserved: dict[int, FakeAdapter] = {}
        self.written: dict[int, str] = {}

    @property
    def used_bytes(self) -> int:
        return sum(adapter.host_bytes for adapter in self.reserved.values())

    def bytes_of(self, adapter: FakeAdapter) -> int:
        return adapter.host_bytes

    def reserve(self, slot: int, adapter: FakeAdapter) -> bool:
        assert slot not in self.reserved
        if self.used_bytes + adapter.host_bytes > DEVICE_BYTES:
            return False
        self.reserved[slot] = adapter
        return True

    def write(self, slot: int, adapter: FakeAdapter) -> None:
        assert self.reserved[slot] == adapter
        self.written[slot] = adapter.digest

    def release(self, slot: int) -> None:
        del self.reserved[slot]
        self.written.pop(slot, None)


class Model:
    """What must be where, as few lines as possible."""

    def __init__(self) -> None:
        self.host: OrderedDict[str, int] = OrderedDict()
        self.device: OrderedDict[str, int] = OrderedDict()
        self.leases: Counter[str] = Counter()
        self.pinned: set[str] = set()
        self.dropping: set[str] = set()

    def bring_to_host(self, digest: str) -> None:
        if digest not in self.host:
            self.host[digest] = SIZES[digest]
            while sum(self.host.values()) > HOST_BYTES:
                del self.host[next(iter(self.host))]

    def bring_to_device(self, digest: str) -> bool:
        """False if it must wait; raises if it would wait for ever."""
        if digest in self.device:
            return True
        self.bring_to_host(digest)
        self.host.move_to_end(digest)
        if len(self.pinned & self.device.keys()) == SLOTS:
            raise FailedPrecondition("pinned")
        idle = [d for d in self.device if not self.leases[d] and d not in self.pinned]
        kept = sum(size for d, size in self.device.items() if d not in idle)
        if kept + SIZES[digest] > DEVICE_BYTES or len(self.device) - len(idle) == SLOTS:
            if self.device.keys() <= self.pinned:
                raise FailedPrecondition("pinned")
            return False
        while self._used() + SIZES[digest] > DEVICE_BYTES or len(self.device) == SLOTS:
            del self.device[idle.pop(0)]
        self.device[digest] = SIZES[digest]
        return True

    def forget_dropped(self) -> None:
        for digest in [d for d in self.dropping if not self.leases[d]]:
            self.host.pop(digest, None)
            self.device.pop(digest, None)
            self.dropping.discard(digest)

    def tier(self, digest: str) -> str:
        return "device" if digest in self.device else "host" if digest in self.host else "disk"

    def _used(self) -> int:
        return sum(self.device.values())


class CacheMachine(RuleBasedStateMachine):
    """Every rule runs until nothing is under way, so that the model can be exact."""

    @initialize()
    def start(self) -> None:
        self.sites = FakeSites()
        self.loader = Loader(lambda folder, digest: FakeAdapter(digest), self.sites.write, 2)
        self.now = 0.0
        self.cache = AdapterCache(
            self.sites,
            self.loader,
            slots=SLOTS,
            host_bytes=HOST_BYTES,
            clock=lambda: self.now,
        )
        self.model = Model()
        self.slot_of: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "loader"):
            self.loader.close()

    def settle(self) -> None:
        """Until nothing is under way, and no failure or request is remembered."""
        self.cache.poll()
        while self.cache.pending_loads:
            assert select.select([self.loader.fileno()], [], [], 10)[0]
            self.cache.poll()
        self.cache.poll()
        self.cache.poll()
        self.now += 10

    def ask(self, digest: str) -> int | None:
        """Asks as an engine does: in each step until the adapter is there or blocked."""
        while (slot := self.cache.acquire(digest, FOLDERS[digest])) is None:
            if self.cache.blocked(digest):
                return None
            assert select.select([self.loader.fileno()], [], [], 10)[0]
            self.cache.poll()
        return slot

    @rule(digest=digests)
    def acquire(self, digest: str) -> None:
        try:
            expected = self.model.bring_to_device(digest)
        except FailedPrecondition:
            expected = None
        try:
            slot = self.ask(digest)
        except FailedPrecondition:
            assert expected is None
        else:
            assert (slot is not None) == expected
            if slot is not None:
                assert (
                    self.slot_of.setdefault(digest, slot) == slot or not self.model.leases[digest]
                )
                self.slot_of[digest] = slot
                self.model.leases[digest] += 1
                self.model.device.move_to_end(digest)
        self.settle()

    @precondition(lambda self: any(self.model.leases.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        leased = sorted(d for d, count in self.model.leases.items() if count)
        digest = data.draw(st.sampled_from(leased))
        self.cache.release(digest)
        self.model.leases[digest] -= 1
        self.model.device.move_to_end(digest)
        self.model.forget_dropped()
        self.settle()

    @rule(digest=digests)
    def load_to_host(self, digest: str) -> None:
        self.cache.load(digest, FOLDERS[digest], to_device=False)
        self.model.dropping.discard(digest)
        if digest not in self.model.device:
            self.model.bring_to_host(digest)
        self.settle()

    @rule(digest=digests)
    def unpin(self, digest: str) -> None:
        self.cache.pin(digest, FOLDERS[digest], pinned=False)
        self.model.pinned.discard(digest)
        self.model.dropping.discard(digest)
        if digest not in self.model.device:
            self.model.bring_to_host(digest)
        self.settle()

    @rule(digest=digests)
    def pin_what_is_there(self, digest: str) -> None:
        if digest in self.model.device:
            self.cache.pin(digest, FOLDERS[digest], pinned=True)
            self.model.pinned.add(digest)
            self.model.dropping.discard(digest)
            self.settle()

    @rule(digest=digests)
    def drop(self, digest: str) -> None:
        self.cache.drop(digest)
        self.model.pinned.discard(digest)
        self.model.dropping.add(digest)
        self.model.forget_dropped()
        self.settle()

    @invariant()
    def everything_is_where_the_model_says(self) -> None:
        if not hasattr(self, "cache"):
            return
        for digest in SIZES:
            assert self.cache.tier(digest) == self.model.tier(digest), digest
        assert sorted(self.sites.written.values()) == sorted(self.model.device)
        assert self.sites.used_bytes <= DEVICE_BYTES

    @invariant()
    def leased_adapters_are_in_the_slot_that_was_told(self) -> None:
        if hasattr(self, "cache"):
            for digest, count in self.model.leases.items():
                if count:
                    assert self.sites.written[self.slot_of[digest]] == digest


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=200, stateful_step_count=30)
