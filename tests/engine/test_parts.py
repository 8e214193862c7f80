"""Steps for which there is not enough memory: what runs, in which parts, and who starves."""

from __future__ import annotations

import pytest
import torch
from structlog.testing import capture_logs

from deltamux.engine.flight import Lazy, Runner
from deltamux.engine.flights import Flights
from deltamux.engine.outcome import SampledToken
from deltamux.engine.parts import Ran
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sequence import Scheduled
from deltamux.wire.messages import Sampling


class Room:
    """A runner for which torch really finds no memory from `limit` rows on."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.shares: list[list[tuple[int, int]]] = []

    def launch(self, scheduled):
        self.shares.append([(item.sequence.index, item.num_tokens) for item in scheduled])
        if sum(item.num_tokens for item in scheduled) >= self.limit:
            torch.empty(1 << 60, dtype=torch.uint8)
        return lambda: [SampledToken(item.sequence.index) for item in scheduled if item.yields]


def share(index: int, tokens: int) -> Scheduled:
    return Scheduled(trial_sequence(index, [0] * tokens, [], Sampling()), tokens)


def run_in_parts(runner: Runner, step: list[Scheduled], whole_prompts: bool) -> Ran:
    flights = Flights(runner, whole_prompts, clock=lambda: 0.0)
    flights.launch(step)
    ran, _ = flights.land()
    return ran


@pytest.fixture(autouse=True)
def quiet():
    with capture_logs() as logs:
        yield logs


def test_a_step_that_fits_runs_once():
    room, step = Room(limit=99), [share(0, 3), share(1, 4)]
    ran = run_in_parts(room, step, whole_prompts=False)
    assert (ran.computed, ran.starved, len(room.shares)) == (step, None, 1)
    assert ran.outcomes == [SampledToken(0), SampledToken(1)]


def test_sequences_are_parted_until_each_part_fits():
    room, step = Room(limit=8), [share(0, 3), share(1, 7), share(2, 1), share(3, 4)]
    ran = run_in_parts(room, step, whole_prompts=False)
    assert room.shares == [
        [(0, 3), (1, 7), (2, 1), (3, 4)],
        [(0, 3), (1, 7)],
        [(0, 3)],
        [(1, 7)],
        [(2, 1), (3, 4)],
    ]
    assert ran.computed == step
    assert ran.outcomes == [SampledToken(index) for index in range(4)]


def test_the_tokens_of_one_are_halved_and_the_rest_is_left_for_later():
    room = Room(limit=4)
    ran = run_in_parts(room, [share(0, 12)], whole_prompts=False)
    assert room.shares == [[(0, 12)], [(0, 6)], [(0, 3)]]
    assert [item.num_tokens for item in ran.computed] == [3]
    assert (ran.outcomes, ran.starved) == ([], None)


def test_a_single_token_without_memory_starves_and_the_others_run_next_time():
    room, step = Room(limit=1), [share(0, 1), share(1, 1)]
    ran = run_in_parts(room, step, whole_prompts=False)
    assert (ran.computed, ran.outcomes, ran.starved) == ([], [], step[0].sequence)
    assert room.shares == [[(0, 1), (1, 1)], [(0, 1)]]


def test_a_prompt_that_must_run_whole_starves():
    step = [share(0, 2), share(1, 12), share(2, 2)]
    ran = run_in_parts(Room(limit=4), step, whole_prompts=True)
    assert (ran.computed, ran.starved) == (step[:1], step[1].sequence)


def test_nothing_scheduled_runs_nothing():
    room = Room(limit=0)
    flights = Flights(room, whole_prompts=False, clock=lambda: 0.0)
    assert not flights.launch([]) and not flights
    assert room.shares == []


def test_any_other_error_is_not_caught():
    class Broken:
        def launch(self, scheduled):
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        run_in_parts(Broken(), [share(0, 2)], whole_prompts=False)


def test_a_host_computes_when_its_step_lands():
    room, step = Room(limit=8), [share(0, 3), share(1, 7)]
    flights = Flights(Lazy(room), whole_prompts=False, clock=lambda: 0.0)
    assert flights.launch(step)
    assert room.shares == []
    ran, _ = flights.land()
    assert ran.computed == step
    assert room.shares == [[(0, 3), (1, 7)], [(0, 3)], [(1, 7)]]
