"""Tasks that go on when the caller who started them goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")


class Background:
    """Keeps its tasks alive until they end; `close` cancels them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def finish(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Awaits `work`, which a cancelled caller leaves running."""
        return await asyncio.shield(self.start(work))

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """Whoever waits for it gets the error; should nobody do any more, the log has it."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.info("adapter work failed", error=str(error))
