"""All that the engine knows of one adapter version."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from deltamux.adapters.traits import Traits
from deltamux.errors import DeltamuxError
from deltamux.wire.messages import AdapterInfo

_NEVER = -2


@dataclass(eq=False)
class Entry:
    """Lives from the first load or request until the drop."""

    digest: str
    path: str
    # What parsing told, both of them; kept when the adapter itself leaves memory.
    info: AdapterInfo | None = None
    traits: Traits | None = None
    # Set while it is on the device, ready to be used.
    slot: int | None = None
    leases: int = 0
    pinned: bool = False
    # A read or a write is under way.
    busy: bool = False
    # Step of the last request that had to be told to wait.
    asked: int = _NEVER
    # The move that a request waits for was counted as a miss or a host hit; its first lease is not
    # another hit.
    counted: bool = False
    # `to_device` of each load and pin not yet answered, in order of arrival.
    orders: deque[bool] = field(default_factory=deque)
    # Drops not yet answered.
    drops: int = 0
    failure: DeltamuxError | None = None
    # Monotonic time until which `failure` answers requests without another try.
    failed_until: float = 0.0

    def awaited(self, step: int) -> bool:
        """Whether a request waits for it: it asked in this step or the one before."""
        return self.asked >= step - 1

    def lease(self) -> None:
        self.leases += 1
        self.asked = _NEVER
        self.counted = False
