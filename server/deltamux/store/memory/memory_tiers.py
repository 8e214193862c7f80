"""Moves adapters between disk, host memory and device slots, one move an adapter at a time."""

from __future__ import annotations

from collections.abc import Mapping

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.errors import FailedPrecondition
from deltamux.store.memory.device_slots import DeviceSlots
from deltamux.store.memory.entry import Entry
from deltamux.store.memory.host_cache import HostCache
from deltamux.store.memory.loader import Completed, Loader
from deltamux.wire.messages import AdapterInfo, AdapterMoved, FromEngine


class MemoryTiers:
    """Host memory and device slots of `entries`; tells every change of tier in `events`."""

    def __init__(
        self,
        sites: DeviceSites,
        loader: Loader,
        slots: int,
        host_bytes: int,
        entries: Mapping[str, Entry],
        events: list[FromEngine],
    ) -> None:
        self.host = HostCache(host_bytes, self._keeps_host)
        self.device = DeviceSlots(sites, slots, self._keeps_slot, self._left_device)
        self.step = 0
        self.pending = 0
        self.host_hits = 0
        self.misses = 0
        self.device_evictions = 0
        self.host_evictions = 0
        self._sites = sites
        self._loader = loader
        self._entries = entries
        self._events = events

    def tier(self, digest: str) -> str:
        entry = self._entries.get(digest)
        if entry is not None and entry.slot is not None:
            return "device"
        return "host" if digest in self.host else "disk"

    def shut_out(self, entry: Entry) -> bool:
        """Whether it must stay on disk for now: host memory is full of adapters in use."""
        return not entry.busy and self.tier(entry.digest) == "disk" and self.host.full

    def towards_host(self, entry: Entry) -> None:
        """Starts the read, if one is needed and there is room for it."""
        if not (entry.busy or entry.digest in self.host or self.host.full):
            self._begin(entry)
            self._loader.read(entry.digest, entry.path)

    def towards_device(self, entry: Entry) -> None:
        """Starts the next move to a slot, if one is needed and there is room for it.

        Raises FailedPrecondition if there can never be.
        """
        if entry.busy or entry.slot is not None:
            return
        adapter = self.host.get(entry.digest)
        if adapter is not None:
            self._write(entry, adapter)
        else:
            self.towards_host(entry)

    def count(self, entry: Entry) -> None:
        """Counts the move that a request has just started."""
        if entry.busy and not entry.counted:
            entry.counted = True
            if entry.digest in self.host:
                self.host_hits += 1
            else:
                self.misses += 1

    def settle(self, entry: Entry, completed: Completed) -> None:
        """Takes the result of a finished move; raises the error that it ended with."""
        self.pending -= 1
        entry.busy = False
        if completed.error is not None:
            self.device.free(entry.digest)
            raise completed.error
        if completed.adapter is not None:
            self._arrived_on_host(entry, completed.adapter, completed.seconds)
        else:
            entry.slot = self.device.slot(entry.digest)
            self._moved(entry, completed.seconds)

    def forget(self, entry: Entry) -> None:
        """Frees the host memory and the slot."""
        entry.slot = None
        self.device.free(entry.digest)
        self.host.drop(entry.digest)

    def _begin(self, entry: Entry) -> None:
        entry.busy = True
        self.pending += 1

    def _write(self, entry: Entry, adapter: Adapter) -> None:
        self._refuse_hopeless(entry)
        slot = self.device.place(adapter, _info(entry).device_bytes)
        if slot is not None:
            self._begin(entry)
            self._loader.write(slot, adapter)
        elif all(self._entries[digest].pinned for digest in self.device):
            raise self._too_large(entry)

    def _refuse_hopeless(self, entry: Entry) -> None:
        if _info(entry).device_bytes > self._sites.capacity_bytes:
            raise self._too_large(entry)
        pinned = [e for e in map(self._entries.__getitem__, self.device) if e.pinned]
        if len(pinned) == self.device.slots:
            raise FailedPrecondition(
                f"all {len(pinned)} device slots are pinned", reason="ALL_SLOTS_PINNED"
            )

    def _too_large(self, entry: Entry) -> FailedPrecondition:
        pinned = sum(e.info.device_bytes for e in self._entries.values() if e.pinned and e.info)
        return FailedPrecondition(
            f"the adapter needs {_info(entry).device_bytes} bytes of device memory; adapters have "
            f"{self._sites.capacity_bytes} bytes, {pinned} of them pinned",
            reason="ADAPTER_TOO_LARGE",
        )

    def _arrived_on_host(self, entry: Entry, adapter: Adapter, seconds: float) -> None:
        if adapter.host_bytes > self.host.capacity_bytes:
            raise FailedPrecondition(
                f"the adapter needs {adapter.host_bytes} bytes of host memory; "
                f"the cache holds {self.host.capacity_bytes} bytes",
                reason="ADAPTER_TOO_LARGE",
            )
        entry.traits = adapter.traits
        entry.info = AdapterInfo(
            family=adapter.family,
            rank=adapter.rank,
            parameters=adapter.parameters,
            host_bytes=adapter.host_bytes,
            device_bytes=self._sites.bytes_of(adapter),
            note=adapter.note,
            task=adapter.task,
            labels=() if adapter.head is None else adapter.head.plan.labels,
        )
        for digest in self.host.put(adapter):
            self._left_host(self._entries[digest])
        self._moved(entry, seconds)

    def _left_host(self, entry: Entry) -> None:
        self.host_evictions += 1
        if entry.slot is None:
            self._moved(entry)

    def _left_device(self, digest: str) -> None:
        entry = self._entries[digest]
        self.device_evictions += 1
        entry.slot = None
        self._moved(entry)

    def _moved(self, entry: Entry, seconds: float = 0.0) -> None:
        tier = self.tier(entry.digest)
        self._events.append(AdapterMoved(entry.digest, tier, entry.info, seconds))

    def _keeps_host(self, digest: str) -> bool:
        entry = self._entries[digest]
        waiting = bool(entry.orders) or entry.awaited(self.step)
        return entry.busy or (entry.slot is None and waiting)

    def _keeps_slot(self, digest: str) -> bool:
        entry = self._entries[digest]
        return entry.leases > 0 or entry.pinned or entry.busy or entry.awaited(self.step)


def _info(entry: Entry) -> AdapterInfo:
    assert entry.info is not None, "an adapter on the host has been parsed"
    return entry.info
