"""Versions appear, become live, are leased, and go with their last lease."""

from __future__ import annotations

from functools import partial

from deltamux.errors import ResourceExhausted
from deltamux.store.catalog.background import Background
from deltamux.store.catalog.lease import Lease
from deltamux.store.catalog.records import Registration, Version
from deltamux.store.catalog.residency import Residency


class Lifecycle:
    """All that happens to one version of a name."""

    def __init__(self, residency: Residency, background: Background) -> None:
        self._residency = residency
        self._disk = residency.disk
        self._background = background

    def add(self, registration: Registration, digest: str) -> Version:
        """The version of this content: a new one, or one that was about to go."""
        version = registration.versions.get(digest)
        if version is None:
            version = self._residency.attach(registration, digest)
            registration.versions[digest] = version
        elif version.retired:
            version.revive()
        return version

    def go_live(self, version: Version) -> None:
        """Requests for the bare name get this version from now on."""
        registration = version.registration
        before, registration.live = registration.live, version
        if before is not None and before is not version:
            self.retire(before)

    def retire(self, version: Version) -> None:
        """Lets a version go as soon as nobody uses it."""
        version.retired = True
        self._forget_unused(version)

    def lease(self, version: Version) -> Lease:
        """Raises ResourceExhausted if its files have had to leave the disk this very moment."""
        held = self._disk.hold(version.digest)
        if not held and version.content.tier == "disk":
            raise ResourceExhausted(
                "the disk tier is full of adapters in use", reason="DISK_FULL", retry_after=1.0
            )
        version.leases += 1
        return Lease(version, str(self._disk.path(version.digest)), partial(self._release, held))

    def _release(self, held: bool, version: Version) -> None:
        if held:
            self._disk.unhold(version.digest)
        version.leases -= 1
        self._forget_unused(version)

    def _forget_unused(self, version: Version) -> None:
        if version.retired and not version.leases:
            del version.registration.versions[version.digest]
            self._background.start(self._residency.detach(version))
