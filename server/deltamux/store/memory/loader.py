"""Reads adapters from disk and writes them to the device on threads of its own."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from deltamux.adapters.adapter import Adapter
from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.errors import (
    DataLoss,
    DeltamuxError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    from_code,
)
from deltamux.store.digest import Fingerprint, content_digest, fingerprint
from deltamux.store.memory.thread_pool import ThreadPool

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Completed:
    """A finished job: a read that brought `adapter`, a write (None), or the error of either."""

    digest: str
    seconds: float
    adapter: Adapter | None = None
    error: DeltamuxError | None = None


@dataclass(frozen=True)
class _Job:
    digest: str
    run: Callable[[], Adapter | None]


class Loader:
    """Jobs go in from the engine thread and come back to it through `completed`.

    Several readers, so that one slow file delays no other adapter; one writer, because the
    device takes one copy at a time anyway. All are daemons: a hung disk never holds up an exit.
    """

    def __init__(
        self,
        parse: Callable[[Path, str], Adapter],
        write: Callable[[int, Adapter], None],
        readers: int = 4,
        alone: bool = False,
    ) -> None:
        """`alone`: the steps compute on the same cores, which they are to have for themselves."""
        self._parse = parse
        self._write = write
        self._readers = ThreadPool(readers, alone)
        self._writer = ThreadPool(1, alone)
        self._completed: deque[Completed] = deque()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False

    def read(self, digest: str, path: str) -> None:
        """Starts reading, verifying and parsing the folder `path`."""
        job = _Job(digest, lambda: self._read_verified(Path(path), digest))
        self._put(self._readers, job)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Starts copying to a slot that has been reserved."""
        job = _Job(adapter.digest, lambda: self._write(slot, adapter))
        self._put(self._writer, job)

    def completed(self) -> list[Completed]:
        """All jobs that ended since the last call, without blocking."""
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return []
        return [self._completed.popleft() for _ in range(len(self._completed))]

    def fileno(self) -> int:
        """A descriptor that is readable while `completed` has something to tell."""
        return self._eventfd

    def wake(self) -> None:
        """Makes the descriptor readable, so that a sleeping engine polls."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._eventfd, 1)

    def close(self) -> None:
        """Lets the threads end after the job that each is at."""
        with self._lock:
            self._closed = True
            os.close(self._eventfd)
        self._readers.close()
        self._writer.close()

    def _put(self, pool: ThreadPool, job: _Job) -> None:
        if not pool.put(lambda: self._finish(_run(job))):
            self._finish(Completed(job.digest, 0.0, error=no_memory()))

    def _finish(self, completed: Completed) -> None:
        self._completed.append(completed)
        self.wake()

    def _read_verified(self, folder: Path, digest: str) -> Adapter:
        before = _verified(folder, digest)
        adapter = self._parse(folder, digest)
        if fingerprint(folder) != before:
            raise _lost("changed while they were read")
        return adapter


def _verified(folder: Path, digest: str) -> Fingerprint:
    """Compares the files with their digest; the fingerprint tells later whether they changed."""
    try:
        before = fingerprint(folder)
        actual = content_digest(folder)
    except (OSError, InvalidArgument) as error:
        raise _lost(f"cannot be read: {_reason(error)}") from None
    if actual != digest:
        raise _lost("do not match their digest")
    return before


def _run(job: _Job) -> Completed:
    start = time.monotonic()
    adapter: Adapter | None = None
    failure: DeltamuxError | None = None
    try:
        adapter = job.run()
    except DeltamuxError as error:
        # A copy: the error's own frames would keep the tensors alive while it is remembered.
        failure = from_code(error.code, error.reason, error.message, error.retry_after)
    except OSError as error:
        failure = _lost(f"cannot be read: {_reason(error)}")
    except Exception as error:
        failure = _load_error(error)
        if isinstance(failure, Internal):
            _log.exception("loading an adapter failed", adapter_version=job.digest)
    return Completed(job.digest, time.monotonic() - start, adapter, failure)


def _load_error(error: Exception) -> DeltamuxError:
    """What clients are told of an error that has no words for them."""
    if is_out_of_memory(error):
        return no_memory()
    return Internal("loading the adapter failed")


def _lost(how: str) -> DataLoss:
    """The front end makes a copy anew that is damaged, or had to make room before it was read."""
    return DataLoss(f"the adapter's files on disk {how}", retry_after=1.0)


def no_memory() -> DeltamuxError:
    return ResourceExhausted(
        "not enough memory to load the adapter", reason="OUT_OF_MEMORY", retry_after=5.0
    )


def _reason(error: OSError | InvalidArgument) -> str:
    """Without the path, which is no client's business."""
    return error.message if isinstance(error, InvalidArgument) else os.strerror(error.errno or 0)
