"""What an adapter becomes beside one base model: its payloads at each site, and their bytes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.primitives.embedding_low_rank import EmbeddingLowRank
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import Base


@dataclass(frozen=True)
class ServedPart:
    """One primitive at one site; `rank` where it has one."""

    site: str
    primitive: str
    rank: int | None
    bytes: int


@dataclass(frozen=True)
class Served:
    """`host_bytes` are those of the parsed adapter, `device_bytes` what it takes in a slot."""

    family: str
    rank: int
    parameters: int
    task: str
    note: str
    host_bytes: int
    device_bytes: int
    parts: tuple[ServedPart, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_served(folder: Path, base: Base) -> Served:
    """Parses the adapter against the base, which gets sites by it and serves nothing afterwards.

    Raises InvalidArgument or FailedPrecondition with the reason why it would be refused.
    """
    adapter = parse_adapter(folder, folder.name, base.structure, base.dtype)
    sites = DeviceSites(
        base.model, base.structure, Rows(base.device), 1, 0, base.dtype, base.device
    )
    return Served(
        adapter.family,
        adapter.rank,
        adapter.parameters,
        adapter.task,
        adapter.note,
        adapter.host_bytes,
        sites.bytes_of(adapter),
        _parts(adapter),
    )


def _parts(adapter: Adapter) -> tuple[ServedPart, ...]:
    return tuple(
        ServedPart(
            site,
            _in_words(payload),
            payload.a.shape[0] if isinstance(payload, LowRank | EmbeddingLowRank) else None,
            sum(tensor.numel() * tensor.element_size() for tensor in payload.tensors),
        )
        for site, payloads in adapter.payloads.items()
        for payload in payloads
    )


def _in_words(payload: Payload) -> str:
    """LowRank is "low rank"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(payload).__name__).lower()
