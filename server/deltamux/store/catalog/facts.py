"""What callers are told of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from deltamux.store.catalog.records import Registration, Version

# From far to near.
TIERS = ("remote", "disk", "host", "device")


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
