"""Runs a step in ever smaller parts where memory does not suffice for the whole of it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import torch

from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.engine.outcome import Outcome
from deltamux.engine.sequence import Scheduled, Sequence

_log = structlog.get_logger(__name__)


class Runner(Protocol):
    """What drives the base model."""

    def run(self, scheduled: Items[Scheduled]) -> list[Outcome]:
        """Computes the scheduled tokens; one outcome for each that yields, in the given order.

        Where it raises, nothing counts as computed, and the same may be asked for again.
        """
        ...


@dataclass
class Ran:
    """What a step has come to; all that is in no field runs again in the next one."""

    computed: list[Scheduled] = field(default_factory=list)
    # One of each computed share that yields, in the same order.
    outcomes: list[Outcome] = field(default_factory=list)
    # There was not enough memory for its share alone.
    starved: Sequence | None = None


def run_in_parts(runner: Runner, scheduled: list[Scheduled], whole_prompts: bool) -> Ran:
    """Runs the step as one; for want of memory in halves, quarters and so on.

    Sequences are parted first, then the tokens of one, unless `whole_prompts` are wanted. At most
    one sequence starves in a step, so that what is short only for a moment ends no more than that.
    """
    ran = Ran()
    parts = [scheduled] if scheduled else []
    while parts:
        part = parts.pop(0)
        outcomes = _attempt(runner, part)
        if outcomes is not None:
            ran.computed += part
            ran.outcomes += outcomes
            continue
        # Does nothing where CUDA is not in use.
        torch.cuda.empty_cache()
        smaller = _parted(part, whole_prompts)
        if not smaller:
            ran.starved = part[0].sequence
            return ran
        parts = smaller + parts
    return ran


def _attempt(runner: Runner, part: list[Scheduled]) -> list[Outcome] | None:
    """None for want of memory. What the failed pass held is free once this has returned."""
    try:
        return runner.run(part)
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
