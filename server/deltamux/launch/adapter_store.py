"""The front end's half of the adapter store: built, opened, told of the engine's ends, closed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import structlog

from deltamux.config import StoreConfig
from deltamux.errors import DeltamuxError, StartupError
from deltamux.frontend.engine_client import EngineClient
from deltamux.launch.preflight import check_folder
from deltamux.metrics import Metrics, Resident
from deltamux.store.catalog.catalog import Catalog
from deltamux.store.catalog.disk_tier import DiskTier
from deltamux.store.catalog.folder_watcher import FolderWatcher

_log = structlog.get_logger(__name__)

# Seconds that a scrape of the metrics waits for the event loop.
SNAPSHOT_SECONDS = 1.0
# More than the adapters that memory can hold.
ALL = 1 << 31


class AdapterStore:
    """The catalog of one server; belongs to the event loop that it is made in."""

    def __init__(self, config: StoreConfig, engine: EngineClient, metrics: Metrics) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self.catalog = Catalog(_disk(config), engine, unread=metrics.load_failed)
        self._watcher: asyncio.Task[None] | None = None
        # As the scrape before saw them.
        self._seen: list[Resident] = []
        engine.on_adapter_moved = self.catalog.moved
        engine.on_adapter_failed = self.catalog.failed
        metrics.watch_residents(
            self._residents, lambda: engine.info.adapter_slots if engine.info else 0
        )

    async def open(self) -> None:
        """Names the configured adapters; raises StartupError for a name that cannot be one."""
        for name, folder in self._config.adapters.items():
            try:
                self.catalog.register(name, folder)
            except DeltamuxError as error:
                raise StartupError(f"--adapter {name}={folder}: {error.message}") from error
        if self._config.adapter_dir is not None:
            watcher = FolderWatcher(self._config.adapter_dir, self.catalog)
            await watcher.look()
            self._watcher = asyncio.create_task(watcher.run())

    def engine_lost(self) -> None:
        self.catalog.engine_lost()

    async def engine_restarted(self) -> None:
        """Brings back what was pinned; the rest comes back when it is asked for."""
        try:
            await self.catalog.engine_restarted()
        except DeltamuxError as error:
            _log.error("pins not restored", error=error.message)

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        self.catalog.close()

    def _residents(self) -> Iterable[Resident]:
        """Called from the exporter's thread; the catalog is read in its own.

        While that one is too busy to answer, what it said before stands: a scrape that failed would
        take all other series with it.
        """
        snapshot = asyncio.run_coroutine_threadsafe(self._snapshot(), self._loop)
        try:
            self._seen = snapshot.result(SNAPSHOT_SECONDS)
        except TimeoutError:
            snapshot.cancel()
        return self._seen

    async def _snapshot(self) -> list[Resident]:
        facts, _ = self.catalog.page(ALL, at_least="host")
        return [Resident(f.name, f.version, f.tier, f.pinned) for f in facts]


def _disk(config: StoreConfig) -> DiskTier:
    try:
        return DiskTier(config.cache_dir, config.disk_bytes, config.max_adapter_bytes, check_folder)
    except OSError as error:
        raise StartupError(f"--adapter-cache-dir {config.cache_dir}: {error.strerror}") from error
