"""Commands about adapters, and the replies that name them by digest alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from deltamux.errors import DeltamuxError, Internal, from_code
from deltamux.wire.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterInfo,
    AdapterLoaded,
    DropAdapter,
    LoadAdapter,
    PinAdapter,
    ToEngine,
)

Command = LoadAdapter | PinAdapter | DropAdapter
Reply = AdapterLoaded | AdapterFailed | AdapterDropped


class AdapterCommands:
    """One command per digest at a time, so that its digest tells which command a reply answers.

    A caller that gives up leaves its command running; the next one waits for its reply.
    """

    def __init__(self, send: Callable[[ToEngine], None]) -> None:
        """`send` raises when there is no engine to send to."""
        self._send = send
        self._running: dict[str, asyncio.Future[Reply | DeltamuxError]] = {}

    async def load(self, command: LoadAdapter | PinAdapter) -> AdapterInfo:
        """What the engine knows of the adapter then; raises as the load failed."""
        match await self._ask(command):
            case AdapterLoaded(info=info):
                return info
            case AdapterFailed() as failed:
                raise from_code(failed.code, failed.reason, failed.message, failed.retry_after)
            case AdapterDropped():
                raise Internal("the engine answered a load with a drop")

    async def drop(self, command: DropAdapter) -> None:
        await self._ask(command)

    def resolve(self, digest: str, outcome: Reply | DeltamuxError) -> None:
        """Gives the running command of this digest its reply, if anyone asked."""
        if running := self._running.pop(digest, None):
            running.set_result(outcome)

    def fail_all(self, error: DeltamuxError) -> None:
        """Every running command ends with `error`."""
        for digest in tuple(self._running):
            self.resolve(digest, error)

    async def _ask(self, command: Command) -> Reply:
        while earlier := self._running.get(command.digest):
            await asyncio.wait({earlier})
        self._send(command)
        reply: asyncio.Future[Reply | DeltamuxError] = asyncio.get_running_loop().create_future()
        self._running[command.digest] = reply
        outcome = await asyncio.shield(reply)
        if isinstance(outcome, DeltamuxError):
            raise outcome
        return outcome
