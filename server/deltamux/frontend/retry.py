"""When a client that was refused should come back, as far as it can be known."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

# Seconds; the bounds hold before the jitter.
SHORTEST, LONGEST = 0.05, 30.0
# While nothing is known yet; and for a server that is going, whose place another may take.
UNKNOWN = 2.0
# Of the newest step in the mean of the recent ones.
_WEIGHT = 0.1


class RetryDelays:
    """Jittered by a fifth, so that those who were refused together do not come back together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step_seconds: float | None = None
        self._start_began = clock()
        self._start_seconds: float | None = None

    def stepped(self, seconds: float) -> None:
        """The engine has computed a step."""
        before = seconds if self._step_seconds is None else self._step_seconds
        self._step_seconds = before + _WEIGHT * (seconds - before)

    def starting(self) -> None:
        """An engine is being started, or must be."""
        self._start_began = self._clock()

    def started(self) -> None:
        """The engine that was being started is ready."""
        self._start_seconds = self._clock() - self._start_began

    def when_full(self, waiting: int) -> float:
        """The queue has moved on once each of its requests has had a step."""
        return _jittered(None if self._step_seconds is None else waiting * self._step_seconds)

    def when_starting(self) -> float:
        """What is left of the time that the last start took."""
        elapsed = self._clock() - self._start_began
        return _jittered(None if self._start_seconds is None else self._start_seconds - elapsed)

    def when_draining(self) -> float:
        return _jittered(None)


def _jittered(seconds: float | None) -> float:
    bounded = UNKNOWN if seconds is None else min(max(seconds, SHORTEST), LONGEST)
    return bounded * random.uniform(0.8, 1.2)
