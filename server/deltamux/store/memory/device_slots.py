"""Which adapter lies in which device slot, and which one leaves when another needs the place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.sites.device_sites import DeviceSites


@dataclass(frozen=True)
class _Place:
    slot: int
    bytes: int


class DeviceSlots:
    """Least recently used first out, both by slots and by bytes; `in_use(digest)` never leaves.

    `left(digest)` is told of each that does.
    """

    def __init__(
        self,
        sites: DeviceSites,
        slots: int,
        in_use: Callable[[str], bool],
        left: Callable[[str], None],
    ) -> None:
        self.slots = slots
        self._sites = sites
        self._in_use = in_use
        self._left = left
        self._free = list(reversed(range(slots)))
        self._places: OrderedDict[str, _Place] = OrderedDict()

    def __iter__(self) -> Iterator[str]:
        """Digests of all that hold a slot, least recently used first."""
        return iter(self._places)

    def slot(self, digest: str) -> int:
        return self._places[digest].slot

    def touch(self, digest: str) -> None:
        """Makes it the most recently used."""
        self._places.move_to_end(digest)

    def place(self, adapter: Adapter, needed: int) -> int | None:
        """Reserves a slot and `needed` bytes; the least recently used leave for it.

        None when too much is in use; then nobody has left, except where the bytes would have
        sufficed but lie scattered.
        """
        idle = [digest for digest in self._places if not self._in_use(digest)]
        if not self._could_fit(needed, idle):
            return None
        leaving = iter(idle)
        while not self._reserve(adapter, needed):
            digest = next(leaving, None)
            if digest is None:
                return None
            self.free(digest)
            self._left(digest)
        return self._places[adapter.digest].slot

    def free(self, digest: str) -> None:
        """Gives the slot back, if it has one."""
        place = self._places.pop(digest, None)
        if place is not None:
            self._sites.release(place.slot)
            self._free.append(place.slot)

    def _could_fit(self, needed: int, idle: list[str]) -> bool:
        room = self._sites.capacity_bytes - self._sites.used_bytes
        room += sum(self._places[digest].bytes for digest in idle)
        return needed <= room and bool(self._free or idle)

    def _reserve(self, adapter: Adapter, needed: int) -> bool:
        if not self._free or not self._sites.reserve(self._free[-1], adapter):
            return False
        self._places[adapter.digest] = _Place(self._free.pop(), needed)
        return True
