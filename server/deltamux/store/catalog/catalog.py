"""All adapters by name: which version a request gets, and how versions come and go.

1. `register` notes a name and its source; nothing is read until somebody asks for it.
2. `resolve` gives a request a lease on one version. The first request for a name copies the
   source to disk; all that come meanwhile wait for that one copy.
3. `load` copies the source again. New content is loaded first and becomes live then, so that a
   bad version never replaces a good one; requests admitted before keep theirs.
4. A version that is not live, or was unloaded, goes with its last lease: from the engine, and
   from the disk if asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from deltamux.errors import (
    DataLoss,
    DeltamuxError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from deltamux.store.catalog.background import Background
from deltamux.store.catalog.disk_tier import DiskTier
from deltamux.store.catalog.facts import AdapterFacts, Loaded, facts
from deltamux.store.catalog.keyed_lock import KeyedLock
from deltamux.store.catalog.lease import Lease
from deltamux.store.catalog.lifecycle import Lifecycle
from deltamux.store.catalog.records import Content, Registration
from deltamux.store.catalog.reference import Reference, check_name
from deltamux.store.catalog.registry import Registry
from deltamux.store.catalog.residency import AdapterEngine, Residency
from deltamux.wire.messages import AdapterFailed, AdapterMoved

_log = structlog.get_logger(__name__)

# Requests for a source that could not be read are refused unseen for this many seconds.
_FAILURE_SECONDS = 2.0


class Catalog:
    """Belongs to one event loop. Work that a caller asked for goes on when the caller goes away."""

    def __init__(
        self,
        disk: DiskTier,
        engine: AdapterEngine,
        clock: Callable[[], float] = time.monotonic,
        unread: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`unread(reason)` is told of every source that cannot be read, or is refused on sight."""
        self._disk = disk
        self._residency = Residency(disk, engine, unread)
        self._clock = clock
        self._registry = Registry()
        self._locks = KeyedLock()
        self._background = Background()
        self._lifecycle = Lifecycle(self._residency, self._background)

    def register(self, name: str, source: str) -> None:
        """Makes `name` known; raises AlreadyExists if it is, with another source."""
        self._registry.register(name, source)

    async def resolve(
        self, reference: str, has_read: Callable[[str], bool] = lambda digest: True
    ) -> Lease:
        """A lease on the version that `reference` means, which is on disk or closer by then.

        `has_read(digest)` tells whether the caller wants nothing of its files any more: otherwise
        they are on disk, even if memory has all that the engine needs.

        Raises NotFound for all that is not known, FailedPrecondition for an adapter that is unfit.
        """
        wanted = Reference.parse(reference)
        version = self._registry.find(wanted)
        if version is None or not self._residency.holds(
            version.content, files=not has_read(version.digest)
        ):
            await self._prepared(self._registry.registration(wanted))
            version = self._registry.find(wanted)
        if version is None:
            raise wanted.not_found()
        return self._lifecycle.lease(version)

    async def load(
        self,
        name: str,
        source: str,
        *,
        upto: str = "device",
        pinned: bool = False,
        expect_version: str = "",
    ) -> Loaded:
        """Reads `source` and makes its content the live version of `name`, loaded as far as `upto`.

        Raises InvalidArgument (also if the digest is not `expect_version`), FailedPrecondition,
        ResourceExhausted or Aborted; the version that was live stays so then.
        """
        check_name(name, "name")
        return await self._background.finish(self._load(name, source, upto, pinned, expect_version))

    async def refresh(self, name: str) -> None:
        """Takes in what the source of a name in use holds now; raises as `load` does."""
        registration = self._registry.get(name)
        if registration is not None and registration.live is not None:
            upto = "disk" if registration.live.content.tier == "disk" else "host"
            await self.load(name, registration.source, upto=upto)

    async def pin(self, reference: str, pinned: bool) -> AdapterFacts:
        """Pins a version on the device, or unpins it."""
        return await self._background.finish(self._pin(Reference.parse(reference, "name"), pinned))

    async def unload(self, reference: str, purge: bool = False) -> None:
        """Forgets a name, or one version; returns when its last request has ended.

        Raises NotFound, or FailedPrecondition while it is pinned.
        """
        await self._background.finish(self._unload(Reference.parse(reference, "name"), purge))

    def get(self, reference: str) -> AdapterFacts:
        """Raises NotFound."""
        wanted = Reference.parse(reference, "name")
        return facts(self._registry.registration(wanted), self._registry.find(wanted))

    def page(
        self, page_size: int, page_token: str = "", at_least: str = "remote"
    ) -> tuple[list[AdapterFacts], str]:
        """Versions at a tier or closer, by name and digest, and the token of the next page.

        The token is empty at the end. Names and versions may come and go between two pages.
        """
        return self._registry.page(page_size, page_token, at_least)

    def moved(self, event: AdapterMoved) -> None:
        """Notes the tier that the engine tells."""
        self._residency.moved(event)

    def failed(self, event: AdapterFailed) -> None:
        """Repairs, in the background, a copy on disk that the engine found damaged."""
        content = self._residency.get(event.digest)
        if content is not None and event.code == DataLoss.code and not content.loading:
            self._background.start(self._repair(content))

    def engine_lost(self) -> None:
        """Nothing is in memory until the next engine loads it."""
        self._residency.lost()

    async def engine_restarted(self) -> None:
        """Returns when all that is pinned is on the device again."""
        await self._residency.restarted()

    def close(self) -> None:
        """Gives up all work under way."""
        self._background.close()

    async def _prepared(self, registration: Registration) -> None:
        """Waits for the one reading of the source that all first requests share."""
        if registration.failure is not None and self._clock() < registration.failed_until:
            raise _on_request(registration.failure)
        if registration.preparing is None:
            registration.preparing = self._background.start(self._prepare(registration))
        try:
            await asyncio.shield(registration.preparing)
        except DeltamuxError as error:
            raise _on_request(error) from None

    async def _prepare(self, registration: Registration) -> None:
        registration.failure = None
        try:
            async with self._locks(registration.name):
                await self._read_source(registration)
        except DeltamuxError as error:
            registration.failure = error
            registration.failed_until = self._clock() + _FAILURE_SECONDS
            raise
        finally:
            registration.preparing = None

    async def _read_source(self, registration: Registration) -> None:
        """Copies the source to disk unless the live version is there; the name is locked."""
        if registration not in self._registry:
            raise Reference(registration.name).not_found()
        live = registration.live
        if live is not None and live.digest in self._disk:
            return
        digest = await self._residency.ingest(registration.source)
        if live is not None and live.digest != digest:
            _log.warning("source changed", adapter=registration.name, adapter_version=digest)
        self._lifecycle.go_live(self._lifecycle.add(registration, digest))
        self._disk.unhold(digest)

    async def _load(
        self, name: str, source: str, upto: str, pinned: bool, expect_version: str
    ) -> Loaded:
        async with self._locks(name):
            digest = await self._residency.ingest(source)
            try:
                _check_expected(digest, expect_version)
                with self._registry.entered(name, source) as registration:
                    known = await self._swap(registration, digest, source, upto, pinned)
            finally:
                self._disk.unhold(digest)
            return Loaded(facts(registration, registration.live), already_loaded=known)

    async def _swap(
        self, registration: Registration, digest: str, source: str, upto: str, pinned: bool
    ) -> bool:
        """Loads this content and makes it live; returns whether it was live before."""
        known = registration.live is not None and registration.live.digest == digest
        version = self._lifecycle.add(registration, digest)
        try:
            await self._residency.bring(version, source, upto, pinned)
        except BaseException:
            if not known:
                self._lifecycle.retire(version)
            raise
        registration.source = source
        self._lifecycle.go_live(version)
        return known

    async def _pin(self, wanted: Reference, pinned: bool) -> AdapterFacts:
        async with self._locks(wanted.name):
            registration = self._registry.registration(wanted)
            live = registration.live
            if pinned and (live is None or not self._residency.holds(live.content)):
                await self._read_source(registration)
            version = self._registry.find(wanted)
            if version is not None and version.pinned != pinned:
                await self._residency.pin(version, pinned)
            return facts(registration, version)

    async def _unload(self, wanted: Reference, purge: bool) -> None:
        async with self._locks(wanted.name):
            registration = self._registry.registration(wanted)
            version = self._registry.find(wanted) if wanted.version else None
            versions = list(registration.versions.values())
            doomed = versions if version is None or version.live else [version]
            if any(version.pinned for version in doomed):
                raise FailedPrecondition(
                    f"adapter {str(wanted)!r} is pinned; unpin it first", reason="ADAPTER_PINNED"
                )
            if doomed == versions:
                self._registry.remove(wanted.name)
            for version in doomed:
                version.purge = purge
                self._lifecycle.retire(version)
        await asyncio.gather(*(version.gone.wait() for version in doomed))

    async def _repair(self, content: Content) -> None:
        registration = next(iter(content.versions)).registration
        try:
            await self._residency.load(content, content.source, "host", pinned=False)
        except DataLoss:
            # The source has other content by now: that is the next version.
            await self.refresh(registration.name)


def _check_expected(digest: str, expected: str) -> None:
    if expected not in ("", digest):
        raise InvalidArgument(
            f"the content's digest is {digest}, not the one expected",
            reason="DIGEST_MISMATCH",
            field="expect_version",
        )


def _on_request(error: DeltamuxError) -> DeltamuxError:
    """An adapter that is unfit is no fault of the request that names it."""
    waiting_helps = error.retry_after is not None
    kind = type(error) if waiting_helps or isinstance(error, NotFound) else FailedPrecondition
    return kind(error.message, reason=error.reason, retry_after=error.retry_after)
