"""What the harness asks of a server, whichever protocol it speaks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from deltamux.bench.workload import PlannedRequest


class BackendError(Exception):
    """A call that failed: `code` is the protocol's word for why, a gRPC status or "HTTP 404"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True)
class Progress:
    """One message of a streamed answer."""

    # New ones.
    tokens: int
    # The adapter was on the device when the request was admitted; None: the message does not say.
    hot: bool | None = None


class Backend(Protocol):
    """A connection to one server; every method but `aclose` may raise BackendError."""

    name: str

    async def vocab_size(self) -> int: ...

    async def adapters(self) -> tuple[str, ...]:
        """The names that requests may ask for; "" is the base and not among them."""
        ...

    def generate(self, request: PlannedRequest) -> AsyncIterator[Progress]:
        """Greedy, not ended by an end-of-sequence token."""
        ...

    async def aclose(self) -> None: ...
