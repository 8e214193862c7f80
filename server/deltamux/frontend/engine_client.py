"""The engine as the front end sees it: requests in, progress out, adapters by their digest.

One task writes to the engine and one reads from it, so that nothing here waits for a socket:
entering a request and cancelling it are plain calls, and a reader that falls behind never
delays the others.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

import structlog

from deltamux.errors import (
    AlreadyExists,
    Cancelled,
    DeltamuxError,
    Internal,
    ResourceExhausted,
    StartupError,
    Unavailable,
    from_code,
)
from deltamux.frontend.adapter_commands import AdapterCommands
from deltamux.frontend.request_stream import RequestStream
from deltamux.frontend.retry import RetryDelays
from deltamux.metrics import Metrics
from deltamux.wire.channel import FrontendEnd
from deltamux.wire.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterInfo,
    AdapterLoaded,
    AdapterMoved,
    DropAdapter,
    FromEngine,
    LoadAdapter,
    PinAdapter,
    Progress,
    Ready,
    RequestFailed,
    StartupFailed,
    StepDone,
    ToEngine,
)

_log = structlog.get_logger(__name__)


class EngineClient:
    """Outlives the engine processes: `attach` for each new one, `fail_all` when one has died."""

    def __init__(self, max_waiting_requests: int, metrics: Metrics) -> None:
        self.info: Ready | None = None
        self.on_adapter_moved: Callable[[AdapterMoved], None] = lambda moved: None
        self.on_adapter_failed: Callable[[AdapterFailed], None] = lambda failed: None
        # The engine may run on, but is not talked to any more.
        self.on_broken: Callable[[], None] = lambda: None
        self._max_waiting = max_waiting_requests
        self._metrics = metrics
        self._draining = False
        self._retry = RetryDelays()
        # By the engine's name and by the client's.
        self._streams: dict[str, RequestStream] = {}
        self._by_id: dict[str, RequestStream] = {}
        self._numbers = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._outbox: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._commands = AdapterCommands(self._command)
        self._ready: asyncio.Future[Ready | StartupError] | None = None
        self._end: FrontendEnd | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    # -- the engine's life ------------------------------------------------------------------

    def attach(self, end: FrontendEnd) -> None:
        """Talks to the engine at the other end of `end`, and owns `end` from now on."""
        loop = asyncio.get_running_loop()
        self._retry.starting()
        self._end, self._outbox, self._ready = end, asyncio.Queue(), loop.create_future()
        self._tasks = (
            loop.create_task(self._read(end)),
            loop.create_task(_write(end, self._outbox)),
        )
        for task in self._tasks:
            task.add_done_callback(self._on_task_done)

    async def ready(self) -> Ready:
        """Waits until the attached engine is ready; raises StartupError when it cannot be."""
        assert self._ready is not None, "attach() comes first"
        outcome = await asyncio.shield(self._ready)
        if isinstance(outcome, StartupError):
            raise outcome
        return outcome

    def fail_all(self, error: DeltamuxError) -> None:
        """The engine is gone: every running call ends with `error`, new ones are UNAVAILABLE."""
        self.info = None
        self._retry.starting()
        for task in self._tasks:
            task.remove_done_callback(self._on_task_done)
            task.cancel()
        self._tasks = ()
        if self._end is not None:
            self._end.close()
            self._end = None
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(StartupError(error.message))
        self._metrics.engine_lost()
        for stream in tuple(self._streams.values()):
            stream.failed_in_engine(error)
        self._commands.fail_all(error)

    def start_draining(self) -> None:
        """Refuses new requests from now on; those that run go on."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Returns when no request is left."""
        await self._idle.wait()

    def send(self, message: ToEngine) -> None:
        """Queues a message for the engine; never waits."""
        self._outbox.put_nowait(message)

    # -- requests ---------------------------------------------------------------------------

    def admit(self, request_id: str) -> RequestStream:
        """A place in the queue for this request, to be entered with `async with`.

        Raises Unavailable, ResourceExhausted (too many wait) or AlreadyExists (the id is taken).
        """
        self.require_ready()
        if request_id in self._by_id:
            raise AlreadyExists(
                f"request_id {request_id!r} is in flight", reason="REQUEST_IN_FLIGHT"
            )
        if self.waiting >= self._max_waiting:
            raise ResourceExhausted(
                f"{self._max_waiting} requests wait already",
                reason="QUEUE_FULL",
                retry_after=self._retry.when_full(self.waiting),
            )
        # A request that comes back under an id just cancelled must not get the old one's tokens.
        stream = RequestStream(
            request_id, f"{request_id}#{next(self._numbers)}", self.send, self._leave
        )
        self._streams[stream.key] = self._by_id[request_id] = stream
        self._idle.clear()
        return stream

    def require_ready(self) -> Ready:
        """What the engine said when it was ready; raises Unavailable when it is not."""
        if self._draining:
            raise Unavailable(
                "the server is shutting down",
                reason="DRAINING",
                retry_after=self._retry.when_draining(),
            )
        if self.info is None:
            raise self._not_ready()
        return self.info

    @property
    def waiting(self) -> int:
        """Requests that have not got their first token."""
        return sum(not stream.started for stream in self._streams.values())

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends these requests with Cancelled; ids that are unknown are ignored."""
        for request_id in request_ids:
            if stream := self._by_id.get(request_id):
                stream.fail(Cancelled("the request was aborted", reason="ABORTED_BY_CALL"))

    def _leave(self, stream: RequestStream) -> None:
        del self._streams[stream.key], self._by_id[stream.request_id]
        if not self._streams:
            self._idle.set()

    # -- adapters ---------------------------------------------------------------------------

    async def load(self, digest: str, path: str, to_device: bool, pinned: bool) -> AdapterInfo:
        """Brings an adapter to the host, or on to the device; raises as the load failed."""
        return await self._commands.load(LoadAdapter(digest, path, to_device, pinned))

    async def pin(self, digest: str, path: str, pinned: bool) -> AdapterInfo:
        """Sets an adapter's pin on the device."""
        return await self._commands.load(PinAdapter(digest, path, pinned))

    async def drop(self, digest: str) -> None:
        """Returns when no sequence uses the adapter and its memory is free."""
        await self._commands.drop(DropAdapter(digest))

    def _command(self, message: ToEngine) -> None:
        if self.info is None:
            raise self._not_ready()
        self.send(message)

    def _not_ready(self) -> Unavailable:
        return Unavailable(
            "the engine is starting",
            reason="ENGINE_NOT_READY",
            retry_after=self._retry.when_starting(),
        )

    # -- the tasks --------------------------------------------------------------------------

    async def _read(self, end: FrontendEnd) -> None:
        while True:
            self._receive(await end.receive())

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepDone(progress=progress, stats=stats):
                self._metrics.step(stats)
                if stats.step_rows:
                    self._retry.stepped(stats.step_seconds)
                self._fan_out(progress)
            case RequestFailed(request_id=key):
                if stream := self._streams.get(key):
                    stream.failed_in_engine(_failure(message))
            case AdapterMoved():
                self._metrics.adapter_moved(message)
                self.on_adapter_moved(message)
            case AdapterFailed(digest=digest, reason=reason):
                self._metrics.load_failed(reason)
                self._commands.resolve(digest, message)
                self.on_adapter_failed(message)
            case AdapterLoaded(digest=digest) | AdapterDropped(digest=digest):
                self._commands.resolve(digest, message)
            case Ready() | StartupFailed():
                self._started(message)

    def _fan_out(self, progress: tuple[Progress, ...]) -> None:
        for part in progress:
            if stream := self._streams.get(part.request_id):
                stream.push(part)

    def _started(self, message: Ready | StartupFailed) -> None:
        assert self._ready is not None
        outcome: Ready | StartupError
        if isinstance(message, Ready):
            self.info = outcome = message
            self._retry.started()
        else:
            outcome = StartupError(message.message)
        if not self._ready.done():
            self._ready.set_result(outcome)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """Neither task ends by itself; a bug in one must not leave calls waiting for ever."""
        if not task.cancelled() and (error := task.exception()):
            _log.error("connection to the engine broke", exc_info=error)
            self.fail_all(Internal("the connection to the engine broke", reason="ENGINE_LOST"))
            self.on_broken()


async def _write(end: FrontendEnd, outbox: asyncio.Queue[ToEngine]) -> None:
    while True:
        await end.send(await outbox.get())


def _failure(failed: RequestFailed) -> DeltamuxError:
    return from_code(failed.code, failed.reason, failed.message, failed.retry_after, failed.field)
