"""The time that a call may take: the client's deadline, or the server's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from deltamux.errors import DeadlineExceeded


@asynccontextmanager
async def deadline(context: grpc.aio.ServicerContext, default: float) -> AsyncIterator[float]:
    """Yields the seconds that are left; DeadlineExceeded ends the body when they are over."""
    remaining = context.time_remaining()
    seconds = default if remaining is None else remaining
    if seconds <= 0:
        raise DeadlineExceeded("the deadline passed before the call arrived")
    try:
        async with asyncio.timeout(seconds):
            yield seconds
    except TimeoutError:
        raise DeadlineExceeded(f"the call took longer than {seconds:.3g} seconds") from None
