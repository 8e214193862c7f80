"""Keeps one engine process alive: starts it, notices its end, starts the next one."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from deltamux.config import EngineConfig
from deltamux.errors import StartupError, Unavailable
from deltamux.frontend.engine_client import EngineClient
from deltamux.launch.engine_process import EngineProcess
from deltamux.wire.channel import FrontendEnd
from deltamux.wire.messages import Ready

_log = structlog.get_logger(__name__)

# Seconds before the first new start; doubled with each start that fails in a row.
FIRST_DELAY = 0.25
LONGEST_DELAY = 30.0
# Starts that fail in a row before the supervisor gives up.
MAX_FAILED_STARTS = 5
# Seconds that the engine's last words may take to arrive after its process has ended.
LAST_WORDS = 1.0


class Supervisor:
    """Owns the engine process and the socket of each of its lives, which lies in `folder`.

    `lost` is awaited when a ready engine has ended and its calls have failed, `restored` when its
    successor is ready.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        engine: EngineClient,
        lost: Callable[[], Awaitable[None]],
        restored: Callable[[], Awaitable[None]],
    ) -> None:
        self._config = config
        self._folder = folder
        self._engine = engine
        engine.on_broken = self.kill
        self._lost = lost
        self._restored = restored
        self._lives = itertools.count(1)
        self._process: EngineProcess | None = None

    async def start(self) -> None:
        """Starts the engine and waits until it is ready; raises StartupError with the reason."""
        started = time.monotonic()
        address = f"ipc://{self._folder}/engine-{next(self._lives)}"
        self._engine.attach(FrontendEnd(address))
        try:
            self._process = process = await EngineProcess.start(self._config, address)
            ready = await self._ready(process)
        except StartupError as error:
            self._engine.fail_all(error)
            await self.stop()
            raise
        seconds = round(time.monotonic() - started, 3)
        _log.info("engine ready", pid=process.pid, seconds=seconds, device=ready.device)

    async def keep_alive(self) -> None:
        """Runs until cancelled; raises StartupError when no new engine will start."""
        while True:
            assert self._process is not None
            how = await self._process.ended()
            _log.error("engine lost", pid=self._process.pid, how=how)
            self._engine.fail_all(
                Unavailable(f"the engine {how}", reason="ENGINE_LOST", retry_after=FIRST_DELAY)
            )
            await self._lost()
            await self._restart()
            await self._restored()

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop()

    def kill(self) -> None:
        """Ends the engine without asking it."""
        if self._process is not None:
            self._process.kill()

    async def _ready(self, process: EngineProcess) -> Ready:
        ready = asyncio.create_task(self._engine.ready())
        ended = asyncio.create_task(process.ended())
        try:
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                await asyncio.wait({ready}, timeout=LAST_WORDS)
            if not ready.done():
                raise StartupError(f"the engine {ended.result()} before it was ready")
            return ready.result()
        finally:
            ready.cancel()
            ended.cancel()

    async def _restart(self) -> None:
        delay = FIRST_DELAY
        for failed in itertools.count(1):
            await asyncio.sleep(delay)
            try:
                await self.start()
            except StartupError as error:
                _log.error("engine did not start", error=error.message, failed_starts=failed)
                if failed == MAX_FAILED_STARTS:
                    raise StartupError(
                        f"gave up after {failed} failed starts of the engine: {error.message}"
                    ) from None
                delay = min(2 * delay, LONGEST_DELAY)
            else:
                return
