"""The engine's cache of adapters: who may run now, what moves next, what the front end hears."""

from __future__ import annotations

import time
from collections.abc import Callable

from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.task import Call, require_fit
from deltamux.adapters.traits import Traits
from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.errors import Aborted, DeltamuxError, FailedPrecondition, Internal, ResourceExhausted
from deltamux.store.memory.entry import Entry
from deltamux.store.memory.loader import Completed, Loader, no_memory
from deltamux.store.memory.memory_tiers import MemoryTiers
from deltamux.wire.messages import AdapterDropped, AdapterFailed, AdapterLoaded, FromEngine

# Requests for an adapter that failed to load are refused unseen for this many seconds.
_FAILURE_SECONDS = 2.0


class AdapterCache:
    """Brings adapters from disk over host memory to device slots; belongs to the engine thread.

    1. `acquire` of an adapter on the device takes a lease: it stays in its slot until `release`.
    2. `acquire` of any other starts its next move, unless one is under way, and returns None; the
       scheduler asks again in the next step.
    3. `poll`, once a step, settles the moves that ended and tells what the front end must know.

    Out of a slot goes the least recently used adapter that is not leased, pinned or waited for;
    out of host memory likewise, by bytes. Every load and pin is answered by one AdapterLoaded or
    AdapterFailed and every drop by one AdapterDropped, for one digest in the order of asking. A
    failed load that only requests asked for is told by one AdapterFailed too.
    """

    def __init__(
        self,
        sites: DeviceSites,
        loader: Loader,
        *,
        slots: int,
        host_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device_hits = 0
        self._clock = clock
        self._loader = loader
        self._entries: dict[str, Entry] = {}
        # Those with loads, pins or drops to answer.
        self._unanswered: dict[str, Entry] = {}
        self._events: list[FromEngine] = []
        self._tiers = MemoryTiers(sites, loader, slots, host_bytes, self._entries, self._events)

    @property
    def pending_loads(self) -> int:
        """Reads and writes under way."""
        return self._tiers.pending

    @property
    def host_hits(self) -> int:
        """Leases that waited for a write from host memory only."""
        return self._tiers.host_hits

    @property
    def misses(self) -> int:
        """Leases that waited for a read from disk."""
        return self._tiers.misses

    @property
    def device_evictions(self) -> int:
        return self._tiers.device_evictions

    @property
    def host_evictions(self) -> int:
        return self._tiers.host_evictions

    def acquire(self, digest: str, path: str, call: Call = "Generate") -> int | None:
        """The device slot, with a lease taken; None while the adapter is not there yet.

        Raises the DeltamuxError of the load that failed, or FailedPrecondition for an adapter
        whose task is not what is called for.
        """
        entry = self._entry(digest, path)
        if entry.info is not None:
            require_fit(entry.info.task, call)
        if entry.slot is not None:
            self.device_hits += not entry.counted
            entry.lease()
            return entry.slot
        entry.asked = self._tiers.step
        if entry.failure is not None and self._clock() < entry.failed_until:
            raise entry.failure.with_traceback(None)
        self._start(entry, self._tiers.towards_device)
        if entry.failure is not None:
            raise entry.failure.with_traceback(None)
        self._tiers.count(entry)
        if not self.pending_loads:
            # Nothing else would wake an idle engine when what blocks this one expires.
            self._loader.wake()
        return None

    def release(self, digest: str) -> None:
        """Gives one lease back."""
        entry = self._entries.get(digest)
        if entry is None or entry.leases == 0:
            raise Internal("an adapter was released more often than acquired")
        entry.leases -= 1
        self._tiers.device.touch(digest)
        if self._unanswered:
            self._loader.wake()

    def traits(self, digest: str) -> Traits | None:
        """The adapter's; None as long as it has never been parsed."""
        entry = self._entries.get(digest)
        return None if entry is None else entry.traits

    def tier(self, digest: str) -> str:
        """The closest tier that holds the adapter: "device", "host" or "disk"."""
        return self._tiers.tier(digest)

    def blocked(self, digest: str) -> bool:
        """Whether a request waits for it and nothing moves: others must let go of memory first."""
        entry = self._entries.get(digest)
        if entry is None or entry.busy or entry.slot is not None:
            return False
        return entry.awaited(self._tiers.step)

    def load(self, digest: str, path: str, to_device: bool, pinned: bool = False) -> None:
        """Brings an adapter to the host, or on to the device; pins it there if asked."""
        if pinned:
            self.pin(digest, path, pinned=True)
        else:
            self._order(self._entry(digest, path), to_device)

    def pin(self, digest: str, path: str, pinned: bool) -> None:
        """Sets or clears the pin; a pinned adapter is brought to the device and stays there."""
        entry = self._entry(digest, path)
        others = sum(other.pinned for other in self._entries.values() if other is not entry)
        if pinned and others >= self._tiers.device.slots:
            error = FailedPrecondition(
                f"all {others} device slots are pinned", reason="ALL_SLOTS_PINNED"
            )
            self._events.append(_failed(digest, error))
            return
        entry.pinned = pinned
        self._order(entry, to_device=pinned)

    def drop(self, digest: str) -> None:
        """Frees the adapter on host and device once its last lease ends; unpins it at once."""
        self._loader.wake()
        entry = self._entries.get(digest)
        if entry is None:
            self._events.append(AdapterDropped(digest))
            return
        entry.pinned = False
        self._fail_orders(entry, Aborted("the adapter was unloaded meanwhile", reason="UNLOADED"))
        entry.drops += 1
        self._unanswered[digest] = entry

    def poll(self) -> list[FromEngine]:
        """Settles finished moves, starts those now possible, returns the news since last time."""
        self._tiers.step += 1
        for completed in self._loader.completed():
            self._settle(completed)
        for entry in list(self._unanswered.values()):
            self._answer(entry)
        events = self._events.copy()
        self._events.clear()
        return events

    def close(self) -> None:
        self._loader.close()

    def _entry(self, digest: str, path: str) -> Entry:
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = Entry(digest, path)
        entry.path = path
        return entry

    def _order(self, entry: Entry, to_device: bool) -> None:
        """Notes a load to answer; one that comes while a drop waits keeps the adapter."""
        entry.failure = None
        self._dropped(entry)
        entry.orders.append(to_device)
        self._unanswered[entry.digest] = entry
        self._loader.wake()

    def _settle(self, completed: Completed) -> None:
        entry = self._entries[completed.digest]
        if not self._succeeds(entry, lambda: self._tiers.settle(entry, completed)):
            return
        if entry.awaited(self._tiers.step) and not entry.drops:
            self._start(entry, self._tiers.towards_device)

    def _start(self, entry: Entry, move: Callable[[Entry], None]) -> None:
        entry.failure = None
        self._succeeds(entry, lambda: move(entry))

    def _succeeds(self, entry: Entry, act: Callable[[], None]) -> bool:
        """Whether it did; otherwise the error is that of all who want the adapter."""
        try:
            act()
        except DeltamuxError as error:
            self._fail(entry, error)
            return False
        except Exception as error:
            # Where an adapter is to lie on the device is worked out here, which takes memory.
            if not is_out_of_memory(error):
                raise
            self._fail(entry, no_memory())
            return False
        return True

    def _answer(self, entry: Entry) -> None:
        """Answers all loads that are fulfilled and starts what the next one needs; or drops."""
        if entry.orders and self._tiers.shut_out(entry):
            # No fault of the adapter's: requests for it go on waiting.
            entry.pinned = False
            self._fail_orders(entry, _host_full())
        while entry.orders:
            move = self._next_move(entry)
            if move is not None:
                self._start(entry, move)
                break
            entry.orders.popleft()
            assert entry.info is not None, "what has reached its tier has been parsed"
            self._events.append(AdapterLoaded(entry.digest, entry.info))
        if entry.drops and not entry.leases and not entry.busy:
            self._tiers.forget(entry)
            del self._entries[entry.digest]
            self._dropped(entry)
        if not entry.orders and not entry.drops:
            self._unanswered.pop(entry.digest, None)

    def _next_move(self, entry: Entry) -> Callable[[Entry], None] | None:
        """What the first unanswered load still needs."""
        to_device, tier = entry.orders[0], self._tiers.tier(entry.digest)
        if tier == "disk":
            return self._tiers.towards_host
        return self._tiers.towards_device if to_device and tier == "host" else None

    def _dropped(self, entry: Entry) -> None:
        self._events.extend([AdapterDropped(entry.digest)] * entry.drops)
        entry.drops = 0

    def _fail(self, entry: Entry, error: DeltamuxError) -> None:
        entry.failure = error
        entry.failed_until = self._clock() + _FAILURE_SECONDS
        entry.counted = False
        entry.pinned = False
        if not entry.orders and not entry.drops:
            self._events.append(_failed(entry.digest, error))
        self._fail_orders(entry, error)

    def _fail_orders(self, entry: Entry, error: DeltamuxError) -> None:
        self._events.extend([_failed(entry.digest, error)] * len(entry.orders))
        entry.orders.clear()


def _host_full() -> ResourceExhausted:
    return ResourceExhausted(
        "host memory is full of adapters in use", reason="HOST_MEMORY_FULL", retry_after=1.0
    )


def _failed(digest: str, error: DeltamuxError) -> AdapterFailed:
    return AdapterFailed(digest, error.code, error.reason, error.message, error.retry_after)
