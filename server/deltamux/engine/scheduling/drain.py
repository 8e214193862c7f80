"""Fairness over device slots: how a request that waits for one gets it while all are leased."""

from __future__ import annotations

from collections.abc import Iterable

from deltamux.engine.sequence import Sequence

# Seconds between one running adapter's draining and the next one's.
PATIENCE = 2.0


class Drain:
    """Limits which adapters the requests behind a blocked one may join.

    A request is blocked while its adapter is on the host and every slot is leased. The first
    blocked request in the queue starts a clock. Each PATIENCE seconds on it, one more running
    adapter drains, the one with the least work left first: it takes no further sequences, so
    its lease ends after a bounded time. Requests behind the blocked one may join the other
    running adapters, or the base, but take no slot of their own. When the blocked request is
    through, the clock starts again for the next one.
    """

    def __init__(self) -> None:
        self._first: Sequence | None = None
        self._since = 0.0

    def joinable(
        self, blocked: Sequence, running: Iterable[Sequence], now: float
    ) -> set[str] | None:
        """Adapters that requests behind `blocked` may join; None: any."""
        if blocked is not self._first:
            self._first, self._since = blocked, now
        draining = int((now - self._since) / PATIENCE)
        if draining == 0:
            return None
        work = _work_left(running)
        return set(sorted(work, key=work.__getitem__)[draining:])


def _work_left(running: Iterable[Sequence]) -> dict[str, int]:
    """Tokens that the longest sequence of each running adapter may still generate."""
    work: dict[str, int] = {}
    for sequence in running:
        if sequence.adapter:
            left = sequence.stopping.max_tokens - sequence.num_generated
            work[sequence.adapter] = max(left, work.get(sequence.adapter, 0))
    return work
