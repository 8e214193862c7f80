"""The steps under way: the device computes them in the order in which they were launched."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from deltamux.engine.flight import Flight, Runner
from deltamux.engine.parts import Ran, run_in_parts
from deltamux.engine.sequence import Scheduled


class Flights:
    """Of one runner, the oldest first."""

    def __init__(self, runner: Runner, whole_prompts: bool, clock: Callable[[], float]) -> None:
        """A prompt is never parted where `whole_prompts` are wanted."""
        self._runner = runner
        self._whole_prompts = whole_prompts
        self._clock = clock
        self._under_way: deque[tuple[Flight, float]] = deque()
        # When the device was last seen to be done with one.
        self._landed = clock()

    def __len__(self) -> int:
        return len(self._under_way)

    def launch(self, scheduled: list[Scheduled]) -> bool:
        """Queues a step, if there is anything in it, behind those that are under way.

        False unless another may be launched behind it: where there was not enough memory to queue
        it, it runs in parts when it lands.
        """
        if not scheduled:
            return False
        started = self._clock()
        flight = Flight.launch(self._runner, scheduled)
        self._under_way.append((flight, started))
        return flight.collect is not None

    def land(self) -> tuple[Ran, float]:
        """Waits for the oldest; what came of it, and for how many seconds the device had it.

        Where memory does not suffice for it, what was launched behind it counts for nothing, since
        it was to read what this one did not write. Then this one runs in parts, unless some of its
        sequences have ended: the others are scheduled again without them.
        """
        flight, started = self._under_way.popleft()
        outcomes = flight.land()
        if outcomes is not None:
            ran = Ran(flight.scheduled, outcomes)
        else:
            self._discard()
            ran = self._run_in_parts(flight.scheduled)
        before, self._landed = self._landed, self._clock()
        return ran, self._landed - max(started, before)

    def _run_in_parts(self, step: list[Scheduled]) -> Ran:
        if any(item.sequence.ended for item in step):
            return Ran()
        return run_in_parts(self._runner, step, self._whole_prompts)

    def _discard(self) -> None:
        while self._under_way:
            flight, _ = self._under_way.popleft()
            flight.land()
