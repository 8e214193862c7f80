"""Reads adapters from disk and writes them to the device on threads of its own."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import structlog
import torch

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


class _Lane:
    """Runs jobs in order on up to `limit` daemon threads, started as they are needed and kept: to
    start one, the engine's thread waits until it runs, which beside busy cores takes milliseconds.

    With `alone`, torch computes on these threads without workers. A thread that has used torch
    keeps a team of OpenMP workers for as long as it lives, and with more workers than cores OpenMP
    no longer spins between two parallel regions: every decode step on a CPU took half as long again
    while a loader's thread with workers was there.
    """

    def __init__(self, limit: int, alone: bool) -> None:
        self._limit = limit
        self._alone = alone
        self._threads = 0
        # Jobs that wait or run.
        self._unfinished = 0
        # None tells a thread to end.
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()

    def put(self, job: Callable[[], None]) -> bool:
        """False: there is no thread for it, because there was no memory for one."""
        with self._lock:
            self._unfinished += 1
            missing = self._threads < min(self._limit, self._unfinished)
        if missing and not self._start() and not self._threads:
            self._unfinished -= 1
            return False
        self._jobs.put(job)
        return True

    def close(self) -> None:
        """Forgets the jobs that no thread has begun, and lets the threads end."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in range(self._threads):
            self._jobs.put(None)

    def _start(self) -> bool:
        try:
            threading.Thread(target=self._work, daemon=True).start()
        except RuntimeError:
            return False
        self._threads += 1
        return True

    def _work(self) -> None:
        if self._alone:
            # Of OpenMP's settings, this is the calling thread's own.
            torch.set_num_threads(1)
        while (job := self._jobs.get()) is not None:
            job()
            # It holds an adapter, which need not stay until the next one comes.
            del job
            with self._lock:
                self._unfinished -= 1


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
        self._reads = _Lane(readers, alone)
        self._writes = _Lane(1, alone)
        self._completed: deque[Completed] = deque()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False

    def read(self, digest: str, path: str) -> None:
        """Starts reading, verifying and parsing the folder `path`."""
        job = _Job(digest, lambda: self._read_verified(Path(path), digest))
        self._put(self._reads, job)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Starts copying to a slot that has been reserved."""
        job = _Job(adapter.digest, lambda: self._write(slot, adapter))
        self._put(self._writes, job)

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
        self._reads.close()
        self._writes.close()

    def _put(self, lane: _Lane, job: _Job) -> None:
        if not lane.put(lambda: self._finish(_run(job))):
            self._finish(Completed(job.digest, 0.0, error=no_memory()))

    def _finish(self, completed: Completed) -> None:
        self._completed.append(completed)
        self.wake()

    def _read_verified(self, folder: Path, digest: str) -> Adapter:
        before = _verified(folder, digest)
        adapter = self._parse(folder, digest)
        if fingerprint(folder) != before:
            raise DataLoss("the adapter's files on disk changed while they were read")
        return adapter


def _verified(folder: Path, digest: str) -> Fingerprint:
    """Compares the files with their digest; the fingerprint tells later whether they changed."""
    try:
        before = fingerprint(folder)
        actual = content_digest(folder)
    except (OSError, InvalidArgument) as error:
        raise DataLoss(f"the adapter's files on disk cannot be read: {_reason(error)}") from None
    if actual != digest:
        raise DataLoss("the adapter's files on disk do not match their digest")
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
        failure = DataLoss(f"the adapter's files on disk cannot be read: {_reason(error)}")
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


def no_memory() -> DeltamuxError:
    return ResourceExhausted(
        "not enough memory to load the adapter", reason="OUT_OF_MEMORY", retry_after=5.0
    )


def _reason(error: OSError | InvalidArgument) -> str:
    """Without the path, which is no client's business."""
    return error.message if isinstance(error, InvalidArgument) else os.strerror(error.errno or 0)
