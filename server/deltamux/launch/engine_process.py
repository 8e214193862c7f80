"""The engine as a child process: how it is started, how it is told to go, how its end is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from dataclasses import asdict

from deltamux.config import EngineConfig
from deltamux.errors import StartupError

# What is started: another one can stand in for it that speaks its language.
PROGRAM: tuple[str, ...] = (sys.executable, "-m", "deltamux.engine")


class EngineProcess:
    """One life of the engine.

    Its standard input carries the configuration as one line of JSON and then stays open: when
    this process dies, however it dies, the engine reads the end of the file and exits.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: EngineConfig, address: str) -> EngineProcess:
        """Raises StartupError where the machine has no process to give."""
        try:
            process = await asyncio.create_subprocess_exec(
                *PROGRAM,
                "--socket",
                address,
                stdin=asyncio.subprocess.PIPE,
                # A terminal's Ctrl-C is for the front end alone, which then drains.
                start_new_session=True,
            )
        except OSError as error:
            raise StartupError(f"no process for the engine: {error.strerror}") from error
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
            await process.stdin.drain()
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ended(self) -> str:
        """Waits for the process to end; says how in words."""
        code = await self._process.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    async def stop(self) -> None:
        """Kills it: it has nothing to put in order, and while it starts it hears nothing."""
        self.kill()
        await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
