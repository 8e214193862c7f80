"""Runs a step, for which memory did not suffice, in ever smaller parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltamux.engine.flight import Flight, Runner
from deltamux.engine.outcome import Outcome
from deltamux.engine.sequence import Scheduled, Sequence


@dataclass
class Ran:
    """What a step has come to; all that is in no field runs again in the next one."""

    computed: list[Scheduled] = field(default_factory=list)
    # One of each computed share that yields, in the same order.
    outcomes: list[Outcome] = field(default_factory=list)
    # There was not enough memory for its share alone.
    starved: Sequence | None = None


def run_in_parts(runner: Runner, step: list[Scheduled], whole_prompts: bool) -> Ran:
    """In halves, quarters and so on. Nothing else is under way.

    Sequences are parted first, then the tokens of one, unless `whole_prompts` are wanted. At most
    one sequence starves in a step, so that what is short only for a moment ends no more than that.
    """
    ran = Ran()
    _run_halves(runner, step, whole_prompts, ran)
    return ran


def _run_halves(runner: Runner, failed: list[Scheduled], whole_prompts: bool, ran: Ran) -> None:
    halves = _parted(failed, whole_prompts)
    if not halves:
        ran.starved = failed[0].sequence
    for half in halves:
        outcomes = Flight.launch(runner, half).land()
        if outcomes is None:
            _run_halves(runner, half, whole_prompts, ran)
        else:
            ran.computed += half
            ran.outcomes += outcomes
        if ran.starved is not None:
            return


def _parted(part: list[Scheduled], whole_prompts: bool) -> list[list[Scheduled]]:
    """Two halves, or the first half of the only one's tokens, or nothing."""
    half = len(part) // 2
    if half:
        return [part[:half], part[half:]]
    (only,) = part
    if whole_prompts or only.num_tokens == 1:
        return []
    return [[Scheduled(only.sequence, only.num_tokens // 2)]]
