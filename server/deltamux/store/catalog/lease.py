"""A request's hold on one version of an adapter."""

from __future__ import annotations

from collections.abc import Callable

from deltamux.store.catalog.records import Version


class Lease:
    """From admission to the last token, the request is served by this version and no other."""

    def __init__(self, version: Version, path: str, end: Callable[[Version], None]) -> None:
        self.name = version.name
        # Digest of the content.
        self.version = version.digest
        # Folder of the files on disk.
        self.path = path
        self._version: Version | None = version
        self._end = end

    def release(self) -> None:
        """Ends the lease; ending it again does nothing."""
        if self._version is not None:
            self._end(self._version)
            self._version = None
