"""The catalog's records: a name has versions, and a version is one content under that name."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from deltamux.errors import DeltamuxError
from deltamux.wire.messages import AdapterInfo


@dataclass(eq=False)
class Content:
    """One digest, however many names mean it: what the engine has loaded of it."""

    digest: str
    tier: str = "disk"
    # What parsing told; None until the engine has read it for the first time.
    info: AdapterInfo | None = None
    versions: set[Version] = field(default_factory=set)
    # Loads that the catalog itself has asked for.
    loading: int = 0

    @property
    def source(self) -> str:
        """Where one of its names has it from."""
        return next(iter(self.versions)).registration.source


@dataclass(eq=False)
class Version:
    """One content under one name."""

    registration: Registration
    content: Content
    leases: int = 0
    pinned: bool = False
    # No longer live, or unloaded: it goes when its last lease ends.
    retired: bool = False
    # Delete the copy on disk as well when it goes.
    purge: bool = False
    # Set when neither engine nor catalog has anything left of it.
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.registration.name

    @property
    def digest(self) -> str:
        return self.content.digest

    @property
    def live(self) -> bool:
        """Whether a request that gives the bare name gets this version."""
        return self is self.registration.live

    def revive(self) -> None:
        """Undoes its retirement; whoever waited for its end need not any longer."""
        self.retired = self.purge = False
        self.gone.set()
        self.gone = asyncio.Event()


@dataclass(eq=False)
class Registration:
    """A name, where its files come from, and its versions by digest."""

    name: str
    source: str
    # None until the first use.
    live: Version | None = None
    versions: dict[str, Version] = field(default_factory=dict)
    # The reading of the source that first requests share.
    preparing: asyncio.Task[None] | None = None
    failure: DeltamuxError | None = None
    # Monotonic time until which `failure` answers requests without another try.
    failed_until: float = 0.0
