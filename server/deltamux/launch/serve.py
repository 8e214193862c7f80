"""The server's life, from its first socket to the end of its last process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Coroutine
from typing import Any

import structlog

from deltamux import logs
from deltamux.config import EngineConfig, FrontendConfig, StoreConfig
from deltamux.errors import StartupError, Unavailable
from deltamux.frontend.defaults import GenerationDefaults
from deltamux.frontend.engine_client import EngineClient
from deltamux.frontend.server import Servers, build_servers
from deltamux.frontend.tokenizer import Tokenizer
from deltamux.launch.adapter_store import AdapterStore
from deltamux.launch.private_folder import PrivateFolder
from deltamux.launch.supervisor import Supervisor
from deltamux.metrics import Exporter, Metrics

_log = structlog.get_logger(__name__)

# Seconds that the answers of cancelled calls have to reach their clients.
LAST_ANSWERS = 1.0
# Seconds for what has been sent to leave the process.
FLUSH = 0.2


def serve(frontend: FrontendConfig, engine: EngineConfig, store: StoreConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns; the first one before it has served
    ends the process.

    Raises StartupError when it cannot serve, or can no more, and KeyboardInterrupt when a second
    signal cut the draining short.
    """
    asyncio.run(_live(frontend, engine, store))


async def _live(frontend: FrontendConfig, engine: EngineConfig, store: StoreConfig) -> None:
    await _Server(frontend, engine, store).live()


class _Server:
    """Comes up, serves, drains and goes down, in this order."""

    def __init__(self, frontend: FrontendConfig, engine: EngineConfig, store: StoreConfig) -> None:
        # First of all: an end by default would leave what is made here behind.
        self._asked_to_stop = asyncio.Event()
        self._ordered_to_stop = False
        self._heed_signals()
        self._frontend = frontend
        self._metrics = Metrics(frontend.model)
        self._engine = EngineClient(frontend.max_waiting_requests, self._metrics)
        self._store = AdapterStore(store, self._engine, self._metrics)
        self._folder = PrivateFolder()
        self._supervisor = Supervisor(
            engine, self._folder.path, self._engine, self._engine_lost, self._engine_back
        )
        self._servers: Servers | None = None
        self._exporter: Exporter | None = None
        self._watch: asyncio.Task[None] | None = None

    async def live(self) -> None:
        try:
            await self._until_asked_to_stop(self._come_up())
            if self._watch is not None:
                await self._until_asked_to_stop(asyncio.shield(self._watch))
                await self._drain()
        except asyncio.CancelledError:
            _log.warning("stopped by a second signal")
            self._engine.fail_all(_shutting_down())
            self._supervisor.kill()
            raise KeyboardInterrupt from None
        finally:
            await self._go_down()
        if self._watch is None:
            # Nothing can stop the thread that reads the model, and Python would wait for it.
            os._exit(0)

    async def _come_up(self) -> None:
        # 1. The engine starts, which takes long; meanwhile the ports open, with health NOT_SERVING.
        await asyncio.gather(self._supervisor.start(), self._listen())
        # 2. The adapters get their names.
        await self._store.open()
        # 3. From here on, an engine that dies is replaced.
        self._watch = asyncio.create_task(self._supervisor.keep_alive())
        # 4. What the start has left stays to the end. Looking through it for garbage takes 0.2
        # seconds, again and again, in which no stream goes on.
        gc.collect()
        gc.freeze()
        # 5. Health says SERVING.
        assert self._servers is not None
        await self._servers.health.set_serving(True)
        self._log_serving(self._servers)

    async def _listen(self) -> None:
        frontend = self._frontend
        tokenizer, defaults = await asyncio.to_thread(_read_model, frontend.model)
        if frontend.metrics_port is not None:
            try:
                self._exporter = self._metrics.serve(frontend.host, frontend.metrics_port)
            except OSError as error:
                address = f"{frontend.host}:{frontend.metrics_port}"
                raise StartupError(f"cannot listen on {address}: {error.strerror}") from error
        self._servers = await build_servers(
            frontend, self._engine, self._store.catalog, tokenizer, defaults, self._metrics
        )
        await self._servers.start()

    def _log_serving(self, servers: Servers) -> None:
        _log.info(
            "serving",
            model=self._frontend.model,
            host=self._frontend.host,
            port=servers.port,
            admin_port=servers.admin_port,
            metrics_port=self._exporter.server_port if self._exporter else None,
        )

    async def _engine_lost(self) -> None:
        assert self._servers is not None
        self._store.engine_lost()
        await self._servers.health.set_serving(False)

    async def _engine_back(self) -> None:
        assert self._servers is not None
        self._metrics.engine_restarted()
        await self._store.engine_restarted()
        if not self._asked_to_stop.is_set():
            await self._servers.health.set_serving(True)

    async def _drain(self) -> None:
        assert self._servers is not None
        grace = self._frontend.drain_grace
        _log.info("draining", grace=grace)
        # 1. Health says NOT_SERVING: routers send nothing more.
        await self._servers.health.set_serving(False)
        # 2. New calls are UNAVAILABLE; those that run go on.
        self._engine.start_draining()
        # 3. They have this long to end.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._engine.wait_idle(), grace)
        # 4. The rest are UNAVAILABLE too.
        self._engine.fail_all(_shutting_down())
        # A listener that closes at once can cut off the statuses that were just sent.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._engine.wait_idle(), LAST_ANSWERS)
        await asyncio.sleep(FLUSH)

    async def _go_down(self) -> None:
        # Garbage to the interpreter, which frees all that it knows of when it ends.
        gc.unfreeze()
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError, StartupError):
                await self._watch
        # 5. The ports close, once the last answers are out.
        if self._servers is not None:
            await self._servers.stop(LAST_ANSWERS)
        if self._exporter is not None:
            # A scrape under way may be waiting for this very loop.
            await asyncio.to_thread(self._exporter.shutdown)
            self._exporter.server_close()
        # 6. The engine goes, and the private folder with its sockets.
        await self._store.close()
        await self._supervisor.stop()
        self._folder.remove()

    async def _until_asked_to_stop(
        self, work: Coroutine[Any, Any, None] | asyncio.Future[None]
    ) -> None:
        """Runs `work` to its end, or cancels it when the first signal comes."""
        working = asyncio.ensure_future(work)
        asked = asyncio.create_task(self._asked_to_stop.wait())
        try:
            await asyncio.wait({working, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working

    def _heed_signals(self) -> None:
        life = asyncio.current_task()
        assert life is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, life)

    def _on_signal(self, life: asyncio.Task[None]) -> None:
        """The first signal asks, the second one orders."""
        if not self._asked_to_stop.is_set():
            self._asked_to_stop.set()
        elif not self._ordered_to_stop:
            self._ordered_to_stop = True
            life.cancel()


def _read_model(model: str) -> tuple[Tokenizer, GenerationDefaults]:
    """Imports transformers, which takes seconds: meanwhile the engine starts, and does so too."""
    logs.take_in_transformers()
    tokenizer = Tokenizer.load(model)
    return tokenizer, GenerationDefaults.load(model, tokenizer.end_of_sequence)


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down", reason="DRAINING")
