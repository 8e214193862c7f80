"""Daemon threads that are started as they are needed, and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch


class ThreadPool:
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
