"""A step between its launch and its landing."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import structlog
import torch

from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.engine.outcome import Outcome
from deltamux.engine.sequence import Scheduled

_log = structlog.get_logger(__name__)
T = TypeVar("T")

# Waits for a step; one outcome for each of its shares that yields, in the order of the schedule.
Collect = Callable[[], list[Outcome]]


class Runner(Protocol):
    """What drives the base model."""

    def launch(self, scheduled: Items[Scheduled]) -> Collect:
        """Queues the scheduled tokens on the device and waits for nothing.

        A token of theirs that is still to come is one that the launch before draws. Until this one
        is collected, nobody else is given what its sequences hold. Where the launch or the
        collecting raises, nothing counts as computed, and the same may be asked for again.
        """
        ...


class Lazy:
    """The runner of a device that is the host itself: it computes when it is collected.

    So what the step before has brought is told first, as it is beside any other device.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def launch(self, scheduled: Items[Scheduled]) -> Collect:
        return lambda: self._runner.launch(scheduled)()


@dataclass
class Flight:
    """While it is under way, its sequences count on what it will bring them."""

    scheduled: list[Scheduled]
    # None where there was not enough memory to queue it.
    collect: Collect | None

    @classmethod
    def launch(cls, runner: Runner, scheduled: list[Scheduled]) -> Flight:
        """Queues a step as one, and returns while the device computes it."""
        for item in scheduled:
            item.take_off()
        return cls(scheduled, _attempt(partial(runner.launch, scheduled), scheduled))

    def land(self) -> list[Outcome] | None:
        """Waits for it; None for want of memory, of which it then holds none any more."""
        collect, self.collect = self.collect, None
        outcomes = None if collect is None else _attempt(collect, self.scheduled)
        for item in self.scheduled:
            item.land()
        if outcomes is None:
            del collect
            # Does nothing where CUDA is not in use.
            torch.cuda.empty_cache()
        return outcomes


def _attempt(act: Callable[[], T], part: list[Scheduled]) -> T | None:
    """None for want of memory. What the failed pass held is free once this has returned."""
    try:
        return act()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    rows = sum(item.num_tokens for item in part)
    _log.warning("not enough memory for a step", rows=rows, sequences=len(part))
    return None
