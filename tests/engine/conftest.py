"""Siblings of the engine's neighbours, without files, threads or tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count

import pytest

from deltamux.adapters.primitives.virtual_tokens import NO_VIRTUAL, Virtual
from deltamux.adapters.task import Call
from deltamux.adapters.traits import Traits
from deltamux.config import EngineConfig
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.limits import Limits
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.sequence import Sequence
from deltamux.errors import DeltamuxError
from deltamux.wire.messages import FromEngine, Progress, Sampling, StepDone, Stopping, ToEngine

BLOCK_SIZE = 4


class FakeAdapters:
    """An adapter cache with `slots` slots, whose loads take `load_polls` calls of poll."""

    def __init__(self, slots: int, load_polls: int = 0) -> None:
        self.slots = slots
        self.device: dict[str, int] = {}
        self.leases: Counter[str] = Counter()
        self.broken: dict[str, DeltamuxError] = {}
        self.virtuals: dict[str, Virtual] = {}
        self.vocabularies: dict[str, int] = {}
        self.load_polls = load_polls
        self._free = list(range(slots))
        self._loading: dict[str, int] = {}
        self._host: set[str] = set()
        self.orders: list[tuple[object, ...]] = []
        self.pending_loads = 0
        self.device_hits = self.host_hits = self.misses = 0
        self.device_evictions = self.host_evictions = 0

    def acquire(self, digest: str, path: str, call: Call) -> int | None:
        if digest in self.broken and digest not in self.device:
            raise self.broken[digest]
        if digest not in self.device and not self._on_host(digest):
            return None
        if digest not in self.device and not self._place(digest):
            return None
        self.leases[digest] += 1
        return self.device[digest]

    def release(self, digest: str) -> None:
        assert self.leases[digest] > 0
        self.leases[digest] -= 1

    def traits(self, digest: str) -> Traits | None:
        """Known a step before `acquire` can give the slot."""
        known = digest in self._host or self._loading.get(digest, self.load_polls) <= 0
        if not known:
            return None
        virtual, size = self.virtuals.get(digest, NO_VIRTUAL), self.vocabularies.get(digest, 0)
        return Traits(virtual, vocab_size=size)

    def blocked(self, digest: str) -> bool:
        idle = [name for name in self.device if not self.leases[name]]
        return digest in self._host and digest not in self.device and not (self._free or idle)

    def tier(self, digest: str) -> str:
        return "device" if digest in self.device else "host" if digest in self._host else "disk"

    def poll(self) -> list[FromEngine]:
        for digest in list(self._loading):
            self._loading[digest] -= 1
        return []

    def load(self, *order: object) -> None:
        self.orders.append(("load", *order))

    def pin(self, *order: object) -> None:
        self.orders.append(("pin", *order))

    def close(self) -> None:
        self.orders.append(("close",))

    def drop(self, *order: object) -> None:
        self.orders.append(("drop", *order))

    def _on_host(self, digest: str) -> bool:
        if digest not in self._host and self._loading.setdefault(digest, self.load_polls) <= 0:
            del self._loading[digest]
            self._host.add(digest)
        return digest in self._host

    def _place(self, digest: str) -> bool:
        idle = [name for name in self.device if not self.leases[name]]
        if not self._free and idle:
            self._free.append(self.device.pop(idle[0]))
            self.device_evictions += 1
        if not self._free:
            return False
        self.device[digest] = self._free.pop()
        return True


class FakePrefixes:
    """Remembers what was filled."""

    def __init__(self) -> None:
        self.fills: list[tuple[int, list[int], int]] = []

    def fill(self, slot: int, blocks: list[int], first: int) -> None:
        self.fills.append((slot, list(blocks), first))


class FakeLink:
    """The engine's end of the socket."""

    def __init__(self) -> None:
        self.inbox: list[ToEngine] = []
        self.sent: list[FromEngine] = []
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None) -> bool:
        self.waits.append(timeout)
        return bool(self.inbox)

    def receive(self) -> list[ToEngine]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: FromEngine) -> None:
        self.sent.append(message)

    def told(self, kind: type[FromEngine]) -> list[FromEngine]:
        return [message for message in self.sent if isinstance(message, kind)]

    def progress(self, request_id: str) -> list[Progress]:
        steps = [progress for done in self.told(StepDone) for progress in done.progress]
        return [progress for progress in steps if progress.request_id == request_id]


@pytest.fixture
def fake_link() -> type[FakeLink]:
    return FakeLink


@pytest.fixture
def fake_adapters() -> type[FakeAdapters]:
    return FakeAdapters


@pytest.fixture
def fake_prefixes() -> type[FakePrefixes]:
    return FakePrefixes


@pytest.fixture
def new_sequence() -> Callable[..., Sequence]:
    """A sequence of its own request, arriving after the one made before."""
    numbers = count()

    def new(
        num_prompt: int = 4,
        max_tokens: int = 4,
        adapter: str = "",
        priority: int = 0,
        leader: Sequence | None = None,
        deadline: float | None = None,
        salt: str | None = None,
    ) -> Sequence:
        """Without a salt, it shares blocks with the choices of its own request only."""
        number = next(numbers)
        request_id = leader.request_id if leader else f"request-{number}"
        return Sequence(
            request_id=request_id,
            index=number if leader else 0,
            tokens=list(range(num_prompt)),
            num_prompt=num_prompt,
            sampling=Sampling(),
            stopping=Stopping(max_tokens=max_tokens),
            priority=priority,
            arrival=leader.arrival if leader else float(number),
            deadline=deadline,
            adapter=adapter,
            adapter_path="",
            cache_salt=request_id if salt is None else salt,
            leader=leader,
        )

    return new


class SchedulerSetup:
    """A scheduler, and the little that the engine does between two schedules."""

    def __init__(
        self, adapters, prefixes, num_blocks=100, seqs=8, budget=16, context=1000, generates=True
    ):
        config = EngineConfig(
            "",
            block_size=BLOCK_SIZE,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_adapter_slots=adapters.slots,
        )
        self.adapters = adapters
        self.allocator = BlockAllocator(num_blocks + 1)
        self.prefixes = prefixes
        limits = Limits(100, context, num_blocks * BLOCK_SIZE, generates)
        self.blocks = BlockManager(self.allocator, BLOCK_SIZE, prefixes)
        self.scheduler = Scheduler(config, limits, self.blocks, adapters)
        self.now = 0.0

    def add(self, *sequences):
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self, seconds=0.1):
        """Runs a step and returns {sequence: tokens computed}."""
        self.now += seconds
        self.adapters.poll()
        plan = self.scheduler.schedule(self.now)
        sampling = [item.sequence for item in plan.scheduled if item.yields]
        for item in plan.scheduled:
            self.blocks.complete(item.sequence, item.num_tokens)
        for sequence in sampling:
            sequence.tokens.append(7)
            if sequence.num_generated == sequence.stopping.max_tokens:
                self.scheduler.finish(sequence)
        return {item.sequence: item.num_tokens for item in plan.scheduled}

    def steps_until(self, condition, limit=500):
        for step in range(limit):
            if condition():
                return step
            self.step()
        raise AssertionError(f"not within {limit} steps")

    def is_empty(self):
        return (
            not self.scheduler.running
            and not self.scheduler.waiting
            and self.allocator.num_free == self.allocator.num_total
            and not self.adapters.leases.total()
        )


@pytest.fixture
def setup(fake_adapters, fake_prefixes):
    def make(slots=2, load_polls=0, **limits):
        return SchedulerSetup(fake_adapters(slots, load_polls), fake_prefixes(), **limits)

    return make
