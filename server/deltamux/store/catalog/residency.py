"""What disk and engine hold of each digest, shared by all names that mean it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import structlog

from deltamux.errors import DataLoss, DeltamuxError
from deltamux.store.catalog.disk_tier import DiskTier
from deltamux.store.catalog.records import Content, Registration, Version
from deltamux.wire.messages import AdapterInfo, AdapterMoved

_log = structlog.get_logger(__name__)


class AdapterEngine(Protocol):
    """What the catalog asks of the engine; each call returns when it is done, or raises."""

    async def load(self, digest: str, path: str, to_device: bool, pinned: bool) -> AdapterInfo: ...

    async def pin(self, digest: str, path: str, pinned: bool) -> AdapterInfo: ...

    async def drop(self, digest: str) -> None: ...


class Residency:
    """A content exists while some version means it; with the last one the engine drops it."""

    def __init__(
        self, disk: DiskTier, engine: AdapterEngine, unread: Callable[[str], None]
    ) -> None:
        """`unread(reason)` is told of sources that cannot be read, or are refused on sight."""
        self.disk = disk
        self._engine = engine
        self._unread = unread
        self._contents: dict[str, Content] = {}

    def get(self, digest: str) -> Content | None:
        return self._contents.get(digest)

    def holds(self, content: Content, files: bool = False) -> bool:
        """Whether disk or engine has the content; with `files`, whether the disk has."""
        return content.digest in self.disk or (content.tier != "disk" and not files)

    def attach(self, registration: Registration, digest: str) -> Version:
        """A new version with this content."""
        content = self._contents.setdefault(digest, Content(digest))
        version = Version(registration, content)
        content.versions.add(version)
        return version

    async def detach(self, version: Version) -> None:
        """Ends a version; returns when what only it needed has been freed."""
        content = version.content
        content.versions.discard(version)
        if not content.versions:
            del self._contents[content.digest]
            # An engine that is gone holds nothing any more.
            with suppress(DeltamuxError):
                await self._engine.drop(content.digest)
            if version.purge and content.digest not in self._contents:
                await asyncio.to_thread(self.disk.purge, content.digest)
        version.gone.set()

    async def ingest(self, source: str) -> str:
        """Copies the source to disk and returns its digest; the copy is held once."""
        try:
            return await asyncio.to_thread(self.disk.ingest, Path(source))
        except DeltamuxError as error:
            self._unread(error.reason)
            raise

    async def load(self, content: Content, source: str, tier: str, pinned: bool) -> None:
        """Brings content up to `tier`; a copy that is damaged or gone is made anew from its source.

        Raises DataLoss if the source has other content by now.
        """
        if tier == "disk" and not pinned:
            return
        content.loading += 1
        try:
            try:
                await self._load(content, tier, pinned)
            except DataLoss:
                await self._load_anew(content, source, tier, pinned)
        finally:
            content.loading -= 1

    async def bring(self, version: Version, source: str, tier: str, pinned: bool) -> None:
        """Loads a version that is to be live; the pin of the one that is passes to it."""
        live = version.registration.live
        if live is None or live is version or not live.pinned:
            pinned = pinned or version.pinned
            await self.load(version.content, source, tier, pinned)
            version.pinned = pinned
            return
        await self.pin(live, False)
        try:
            await self.load(version.content, source, tier, pinned=True)
            version.pinned = True
        except DeltamuxError:
            await self.pin(live, True)
            raise

    async def pin(self, version: Version, pinned: bool) -> None:
        """Sets a version's pin; the content stays pinned while any of its versions is."""
        content = version.content
        others = any(other.pinned for other in content.versions if other is not version)
        path = str(self.disk.path(content.digest))
        content.info = await self._engine.pin(content.digest, path, pinned or others)
        version.pinned = pinned

    def moved(self, event: AdapterMoved) -> None:
        content = self._contents.get(event.digest)
        if content is not None:
            content.tier = event.tier
            content.info = event.info or content.info

    def lost(self) -> None:
        """The engine is gone, and with it all that it had."""
        for content in self._contents.values():
            content.tier = "disk"

    async def restarted(self) -> None:
        """A new engine has nothing: what is pinned is brought back."""
        await asyncio.gather(*map(self._pin_again, list(self._contents.values())))

    async def _pin_again(self, content: Content) -> None:
        if any(version.pinned for version in content.versions):
            try:
                await self.load(content, content.source, "device", pinned=True)
            except DeltamuxError as error:
                _log.error("pin lost", adapter_version=content.digest, error=error.message)
                for version in content.versions:
                    version.pinned = False

    async def _load_anew(self, content: Content, source: str, tier: str, pinned: bool) -> None:
        await asyncio.to_thread(self.disk.purge, content.digest)
        digest = await self.ingest(source)
        try:
            if digest != content.digest:
                raise DataLoss("the stored adapter is damaged and its source has changed")
            await self._load(content, tier, pinned)
        finally:
            self.disk.unhold(digest)

    async def _load(self, content: Content, tier: str, pinned: bool) -> None:
        path = str(self.disk.path(content.digest))
        content.info = await self._engine.load(content.digest, path, tier == "device", pinned)
