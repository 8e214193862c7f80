"""The simulation sees what is wrong: each mistake is made on purpose, and some seed finds it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltamux.engine.flights import Flights
from deltamux.engine.kv import block_manager
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_keys import block_key
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.parts import run_in_parts
from deltamux.engine.scheduling import scheduler
from deltamux.engine.scheduling.scheduler import Scheduler


@pytest.fixture
def keeps_a_lease(monkeypatch):
    cancel = Scheduler.cancel

    def forgetful(self, request_id, indices=()):
        for sequence in self.running:
            if sequence.request_id == request_id:
                sequence.slot = None
        cancel(self, request_id, indices)

    monkeypatch.setattr(Scheduler, "cancel", forgetful)


@pytest.fixture
def shares_without_a_reference(monkeypatch):
    monkeypatch.setattr(BlockAllocator, "share", lambda self, blocks: None)


@pytest.fixture
def shares_the_last_block_too(monkeypatch):
    monkeypatch.setattr(
        BlockManager, "_num_reusable", lambda self, num_tokens: num_tokens // self._block_size
    )


@pytest.fixture
def shares_between_adapters(monkeypatch):
    monkeypatch.setattr(
        block_manager,
        "block_key",
        lambda sequence, index, size: block_key(
            replace(sequence, adapter="", block_keys=[]), index, size
        ),
    )


@pytest.fixture
def shares_what_is_not_computed_yet(monkeypatch):
    start = BlockManager.start

    def hasty(self, sequence):
        start(self, sequence)
        for index in range(self._num_reusable(sequence.num_places)):
            key = block_key(sequence, index, self._block_size)
            self._allocator.publish(sequence.blocks[index], key)

    monkeypatch.setattr(BlockManager, "start", hasty)


@pytest.fixture
def shares_between_prefixes(monkeypatch):
    """Virtual tokens of two adapters have the same numbers."""
    key = block_key
    monkeypatch.setattr(
        block_manager,
        "block_key",
        lambda sequence, index, size: (
            b"virtual" + bytes([index])
            if (index + 1) * size <= sequence.virtual.tokens
            else key(sequence, index, size)
        ),
    )


@pytest.fixture
def forgets_to_fill(monkeypatch, paged_runner):
    monkeypatch.setattr(paged_runner, "fill", lambda self, slot, blocks, first: None)


@pytest.fixture
def keeps_computed_tokens_of_the_preempted(monkeypatch):
    release = BlockManager.release

    def forgetful(self, sequence):
        computed = sequence.num_computed
        release(self, sequence)
        sequence.num_computed = computed

    start = BlockManager.start

    def stale(self, sequence):
        computed = sequence.num_computed
        start(self, sequence)
        sequence.num_computed = max(sequence.num_computed, computed)

    monkeypatch.setattr(BlockManager, "release", forgetful)
    monkeypatch.setattr(BlockManager, "start", stale)


@pytest.mark.parametrize(
    "mistake",
    [
        "keeps_a_lease",
        "shares_without_a_reference",
        "shares_the_last_block_too",
        "shares_between_adapters",
        "shares_what_is_not_computed_yet",
        "shares_between_prefixes",
        "forgets_to_fill",
        "keeps_computed_tokens_of_the_preempted",
    ],
)
def test_mistakes_of_any_engine_are_caught(mistake, request, simulate, ahead):
    request.getfixturevalue(mistake)
    with pytest.raises(AssertionError, match="seed"):
        simulate(ahead)


@pytest.fixture
def lets_go_under_a_step(monkeypatch):
    def hasty(self):
        while self._leaving:
            self._release(self._leaving.pop())

    monkeypatch.setattr(Scheduler, "let_go", hasty)


@pytest.fixture
def hears_who_has_ended(monkeypatch):
    finish = Scheduler.finish

    def forgetful(self, sequence):
        finish(self, sequence)
        sequence.ended = False

    monkeypatch.setattr(Scheduler, "finish", forgetful)


@pytest.fixture
def runs_ahead_of_penalties(monkeypatch):
    monkeypatch.setattr(scheduler, "need_tokens", lambda sampling: False)


@pytest.fixture
def preempts_under_a_step(monkeypatch):
    monkeypatch.setattr(
        Scheduler,
        "can_run_ahead",
        lambda self: not any(map(scheduler._awaits_outcome, self.running)),
    )


@pytest.fixture
def builds_on_what_was_not_launched(monkeypatch):
    launch = Flights.launch
    monkeypatch.setattr(Flights, "launch", lambda self, step: launch(self, step) or bool(step))


@pytest.fixture
def keeps_what_was_launched_behind_a_failure(monkeypatch):
    monkeypatch.setattr(Flights, "_discard", lambda self: None)


@pytest.fixture
def parts_what_has_ended(monkeypatch):
    monkeypatch.setattr(
        Flights,
        "_run_in_parts",
        lambda self, step: run_in_parts(self._runner, step, whole_prompts=False),
    )


@pytest.fixture
def forgets_the_last_draw(monkeypatch, paged_runner):
    row = paged_runner._row

    def stale(self, item):
        made = row(self, item)
        return made if made.token_ids else replace(made, token_ids=item.sequence.tokens[-1:])

    monkeypatch.setattr(paged_runner, "_row", stale)


@pytest.mark.parametrize(
    "mistake",
    [
        "lets_go_under_a_step",
        "hears_who_has_ended",
        "runs_ahead_of_penalties",
        "preempts_under_a_step",
        "builds_on_what_was_not_launched",
        "keeps_what_was_launched_behind_a_failure",
        "parts_what_has_ended",
        "forgets_the_last_draw",
    ],
)
def test_mistakes_of_running_ahead_are_caught(mistake, request, simulate):
    request.getfixturevalue(mistake)
    with pytest.raises(AssertionError, match="seed"):
        simulate(ahead=True)
