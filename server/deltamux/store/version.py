"""What the catalog knows: names, their versions, and the content that versions share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import msgspec

from deltamux.errors import DeltamuxError
from deltamux.wire.messages import AdapterInfo

# From far to near.
TIERS = ("remote", "disk", "host", "device")


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


@dataclass(frozen=True)
class AdapterFacts:
    """One line of the list of adapters; what only its content tells is empty until it was read."""

    name: str
    version: str
    source: str
    tier: str
    pinned: bool
    live: bool
    active_requests: int
    family: str = ""
    rank: int = 0
    parameters: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    note: str = ""
    task: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """Outcome of loading an adapter by name."""

    facts: AdapterFacts
    # The name had this very content before.
    already_loaded: bool


def facts(registration: Registration, version: Version | None) -> AdapterFacts:
    """Of one version, or of a name whose source has not been read."""
    if version is None:
        return AdapterFacts(registration.name, "", registration.source, "remote", False, True, 0)
    known = AdapterFacts(
        name=registration.name,
        version=version.digest,
        source=registration.source,
        tier=version.content.tier,
        pinned=version.pinned,
        live=version.live,
        active_requests=version.leases,
    )
    info = version.content.info
    return replace(known, **msgspec.structs.asdict(info)) if info else known
