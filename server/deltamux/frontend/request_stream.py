"""The front end's hold on one request: what the engine made of it and nobody has read yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

import msgspec

from deltamux.errors import DeltamuxError, ResourceExhausted
from deltamux.frontend.limits import MAX_UNREAD_TOKENS
from deltamux.wire.messages import Cancel, Progress, Submit, ToEngine

# Seconds that a failed call has to notice by itself: a write that is interrupted under way can
# keep gRPC from sending the status after it.
INTERRUPT_SECONDS = 0.2


class RequestStream:
    """Asynchronous iterator of Progress, and the context in which the request lives.

    Belongs to the task that entered it. Leaving the context, for whatever reason, ends the
    request in the engine. A failure (of the engine, or because nobody reads) reaches that task
    at once, even while it waits for something else: it is cancelled there, and the context
    turns the cancellation into the error.
    """

    def __init__(
        self,
        request_id: str,
        key: str,
        send: Callable[[ToEngine], None],
        leave: Callable[[RequestStream], None],
    ) -> None:
        self.request_id = request_id
        # The engine's name for this request: unlike the client's, never used again.
        self.key = key
        # Whether the engine has begun with it.
        self.started = False
        self._send = send
        self._leave = leave
        # The choices that the engine still works on.
        self._running: set[int] = set()
        # Progress of one choice that is not read yet is merged: a slow reader costs no queue.
        self._unread: dict[int, Progress] = {}
        self._unread_tokens = 0
        self._error: DeltamuxError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[object] | None = None
        self._interrupted = False

    async def __aenter__(self) -> RequestStream:
        self._task = asyncio.current_task()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        self._leave(self)
        if self._running:
            self._send(Cancel(self.key))
        if not self._interrupted or task is None or self._error is None:
            return
        others = task.uncancel()
        if kind is asyncio.CancelledError and not others:
            raise self._error from None

    def submit(self, submit: Submit) -> None:
        """Sends the request to the engine, under `key`; never waits."""
        self._running = set(range(submit.n))
        self._send(submit)

    def cancel_choice(self, index: int) -> None:
        """Ends one choice in the engine; the others go on."""
        if index in self._running:
            self._running.remove(index)
            self._send(Cancel(self.key, (index,)))

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Progress:
        """The oldest unread progress, all of its choice's in one; raises what ended the request."""
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        progress = self._unread.pop(next(iter(self._unread)))
        self._unread_tokens -= len(progress.token_ids)
        return progress

    def push(self, progress: Progress) -> None:
        """Takes in what a step did; never waits."""
        if self._error is not None or progress.index not in self._running:
            return
        self.started = True
        if progress.finish:
            self._running.remove(progress.index)
        earlier = self._unread.get(progress.index)
        self._unread[progress.index] = _merged(earlier, progress) if earlier else progress
        self._unread_tokens += len(progress.token_ids)
        self._wake()
        if self._unread_tokens > MAX_UNREAD_TOKENS:
            self._unread.clear()
            self.fail(
                ResourceExhausted(
                    f"more than {MAX_UNREAD_TOKENS} tokens were left unread",
                    reason="SLOW_CONSUMER",
                )
            )

    def failed_in_engine(self, error: DeltamuxError) -> None:
        """The engine has ended the request itself."""
        self._running.clear()
        self.fail(error)

    def fail(self, error: DeltamuxError) -> None:
        """Ends the request with this error, at once."""
        if self._error is not None:
            return
        self._error = error
        self._wake()
        if self._task is not None:
            asyncio.get_running_loop().call_later(INTERRUPT_SECONDS, self._interrupt)

    def _interrupt(self) -> None:
        """Ends a call that is still busy elsewhere, in a write that its reader holds up for one."""
        if self._task is not None:
            self._interrupted = True
            self._task.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merged(earlier: Progress, later: Progress) -> Progress:
    return msgspec.structs.replace(
        earlier,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
        finish=later.finish,
    )
