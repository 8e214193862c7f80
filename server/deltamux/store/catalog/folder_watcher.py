"""Finds adapters in a folder whose subfolders are one adapter each, named as the subfolder is."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog

from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.errors import DeltamuxError
from deltamux.store.catalog.catalog import Catalog
from deltamux.store.digest import Fingerprint, fingerprint

_log = structlog.get_logger(__name__)


class FolderWatcher:
    """Registers new subfolders at once and takes in changed ones when they have come to rest.

    One without weights, or with a pickle, is known too, so that requests are told what it lacks.
    A subfolder that disappears stays known: requests are served from the copy on disk.
    """

    def __init__(self, folder: Path, catalog: Catalog, interval: float = 2.0) -> None:
        """`interval`: seconds between two looks."""
        self._folder = folder
        self._catalog = catalog
        self._interval = interval
        # As last taken in, by name.
        self._known: dict[str, Fingerprint] = {}
        # As seen in the last look.
        self._seen: dict[str, Fingerprint] = {}

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            await self.look()

    async def look(self) -> None:
        """Looks once; never raises for what an adapter's files are like."""
        before, self._seen = self._seen, await asyncio.to_thread(_adapters, self._folder)
        for name in self._seen.keys() - self._known.keys():
            self._register(name)
        resting = (name for name, seen in self._seen.items() if before.get(name) == seen)
        changed = [name for name in resting if self._seen[name] not in ((), self._known[name])]
        await asyncio.gather(*map(self._refresh, changed))

    def _register(self, name: str) -> None:
        self._known[name] = self._seen[name]
        try:
            self._catalog.register(name, str(self._folder / name))
        except DeltamuxError as error:
            _log.warning("adapter folder not served", folder=name, error=error.message)

    async def _refresh(self, name: str) -> None:
        seen = self._seen[name]
        try:
            await self._catalog.refresh(name)
        except DeltamuxError as error:
            _log.warning("adapter not refreshed", adapter=name, error=error.message)
            if error.retry_after is not None:
                return
        self._known[name] = seen


def _adapters(folder: Path) -> dict[str, Fingerprint]:
    """Subfolders with the config of an adapter; () for one whose weights are not there."""
    found: dict[str, Fingerprint] = {}
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        _log.warning("adapter folder cannot be read", error=os.strerror(error.errno or 0))
        return {}
    for entry in entries:
        try:
            found[entry.name] = fingerprint(entry.path)
        except OSError:
            if os.path.lexists(f"{entry.path}/{CONFIG}"):
                found[entry.name] = ()
    return found
