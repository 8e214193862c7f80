"""Parsed adapters in host memory: least recently used first out, by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from deltamux.adapters.adapter import Adapter


class HostCache:
    """What `in_use(digest)` names stays, even if that holds the cache above its capacity."""

    def __init__(self, capacity_bytes: int, in_use: Callable[[str], bool]) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._in_use = in_use
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    @property
    def full(self) -> bool:
        """Whether another adapter would displace nothing but what is in use."""
        return self.used_bytes >= self.capacity_bytes and self._victim() is None

    def get(self, digest: str) -> Adapter | None:
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: Adapter) -> list[str]:
        """Keeps the adapter; returns the digests evicted for it, oldest first."""
        self.drop(adapter.digest)
        self._adapters[adapter.digest] = adapter
        self.used_bytes += adapter.host_bytes
        evicted = []
        while self.used_bytes > self.capacity_bytes:
            victim = self._victim(keep=adapter.digest)
            if victim is None:
                break
            self.drop(victim)
            evicted.append(victim)
        return evicted

    def drop(self, digest: str) -> None:
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.used_bytes -= adapter.host_bytes

    def _victim(self, keep: str = "") -> str | None:
        return next((d for d in self._adapters if d != keep and not self._in_use(d)), None)
