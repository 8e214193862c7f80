"""Launches a step, and lands it: in ever smaller parts where memory does not suffice for it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import structlog
import torch

from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.engine.outcome import Outcome
from deltamux.engine.sequence import Scheduled, Sequence

_log = structlog.get_logger(__name__)
T = TypeVar("T")

# Waits for a step; one outcome for each of its shares that yields, in the order of the schedule.
Collect = Callable[[], list[Outcome]]


class Runner(Protocol):
    """What drives the base model."""

    def launch(self, scheduled: Items[Scheduled]) -> Collect:
        """Queues the scheduled tokens on the device and waits for nothing.

        Until it is collected, no sequence of it may change. Where this or the collecting raises,
        nothing counts as computed, and the same may be asked for again.
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
    """A step between its launch and its landing."""

    scheduled: list[Scheduled]
    # None where there was not enough memory to queue it.
    collect: Collect | None


@dataclass
class Ran:
    """What a step has come to; all that is in no field runs again in the next one."""

    computed: list[Scheduled] = field(default_factory=list)
    # One of each computed share that yields, in the same order.
    outcomes: list[Outcome] = field(default_factory=list)
    # There was not enough memory for its share alone.
    starved: Sequence | None = None


def launch(runner: Runner, scheduled: list[Scheduled]) -> Flight:
    """Queues a step as one, and returns while the device computes it."""
    if not scheduled:
        return Flight(scheduled, list)
    return Flight(scheduled, _attempt(partial(runner.launch, scheduled), scheduled))


def land(runner: Runner, flight: Flight, whole_prompts: bool) -> Ran:
    """Waits for a step; what failed for want of memory runs in halves, quarters and so on.

    Sequences are parted first, then the tokens of one, unless `whole_prompts` are wanted. At most
    one sequence starves in a step, so that what is short only for a moment ends no more than that.
    """
    ran = Ran()
    parts: list[list[Scheduled]] = []
    while True:
        part, outcomes = flight.scheduled, _outcomes(flight)
        if outcomes is not None:
            ran.computed += part
            ran.outcomes += outcomes
        elif smaller := _parted(part, whole_prompts):
            parts = smaller + parts
        else:
            ran.starved = part[0].sequence
            return ran
        if not parts:
            return ran
        flight = launch(runner, parts.pop(0))


def _outcomes(flight: Flight) -> list[Outcome] | None:
    """None for want of memory; none of it is then held by the flight any more."""
    collect, flight.collect = flight.collect, None
    outcomes = None if collect is None else _attempt(collect, flight.scheduled)
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


def _parted(part: list[Scheduled], whole_prompts: bool) -> list[list[Scheduled]]:
    """Two halves, or the first half of the only one's tokens, or nothing."""
    half = len(part) // 2
    if half:
        return [part[:half], part[half:]]
    (only,) = part
    if whole_prompts or only.num_tokens == 1:
        return []
    return [[Scheduled(only.sequence, only.num_tokens // 2)]]
