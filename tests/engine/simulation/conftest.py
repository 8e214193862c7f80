"""A model, an engine around it and its clients, all drawn from one seed; any seed replays."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import pytest
import torch
from structlog.testing import capture_logs

from deltamux.adapters.primitives.virtual_tokens import NO_VIRTUAL, Virtual
from deltamux.config import EngineConfig
from deltamux.engine.engine import Engine
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.limits import Limits
from deltamux.engine.outcome import NonFinite, SampledToken
from deltamux.engine.sampling.logit_edits import need_tokens
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.sequence import Sequence
from deltamux.engine.submission import Submissions
from deltamux.errors import InvalidArgument
from deltamux.wire.messages import Cancel, RequestFailed, Sampling, StepDone, Stopping, Submit

SEEDS = 2000
FAULTY_STEPS = 30
# Steps within which everything ends once the faults have stopped.
QUIET_STEPS = 400
VOCABULARY = 50
BLOCK_SIZE = 2
NUM_BLOCKS = 12
MAX_MODEL_LEN = 20
# Of adapters that bring embeddings, and of one that brings keys and values.
VIRTUALS = {"b": Virtual(3), "c": Virtual(5, computed=False), "d": Virtual(9)}


def next_token(written: list[tuple[str, int]]) -> int:
    """Stands for the model: a function of every token so far and of the adapter that ran it."""
    return crc32(repr(written).encode()) % VOCABULARY


def solo_run(submit: Submit) -> list[int]:
    virtual = VIRTUALS.get(submit.adapter, NO_VIRTUAL).tokens
    tokens = [*range(-1, -1 - virtual, -1), *submit.prompt]
    for _ in range(submit.stopping.max_tokens):
        tokens.append(next_token([(submit.adapter, token) for token in tokens]))
        if tokens[-1] in submit.stopping.stop_token_ids or len(tokens) == MAX_MODEL_LEN:
            break
    return tokens[virtual + len(submit.prompt) :]


@dataclass(frozen=True)
class Row:
    """A share as the device is given it, which does not see what becomes of its sequence."""

    slot: int | None
    blocks: list[int]
    places: range
    # None where the launch before draws it.
    token_ids: list[int] | None
    sequence: Sequence
    yields: bool


class PagedRunner:
    """Keeps what each place of each block holds, so that a wrong block yields a wrong token.

    What is queued is computed in this order: at once, or not before somebody waits for it.
    """

    def __init__(self, adapters, chance, hurries):
        self.adapters, self.chance, self.hurries = adapters, chance, hurries
        self.pages: dict[tuple[int, int], tuple[str, int]] = {}
        self.queue: deque[Callable[[], None]] = deque()
        self.last: dict[Sequence, int] = {}
        # Steps that were launched, and not collected.
        self.under_way: list[list[Row]] = []
        self.followers = 0

    def launch(self, scheduled):
        if self.chance(0.01):
            raise torch.OutOfMemoryError
        rows = [self._row(item) for item in scheduled]
        last, self.last = self.last, {}
        self._enqueue(partial(self._compute, rows, last, drawn := self.last))
        self.followers += bool(self.under_way)
        self.under_way.append(rows)
        return lambda: self._collect(rows, drawn)

    def fill(self, slot, blocks, first):
        self._enqueue(partial(self._fill, slot, list(blocks), first))

    def _row(self, item):
        sequence = item.sequence
        token_ids = sequence.ids(item.first, item.num_tokens)
        if len(token_ids) < item.num_tokens:
            assert item.num_tokens == 1
            assert not need_tokens(sequence.sampling), "to be edited by tokens that nobody knows"
        return Row(
            sequence.slot,
            list(sequence.blocks),
            range(item.first, item.first + item.num_tokens),
            token_ids or None,
            sequence,
            item.yields,
        )

    def _enqueue(self, work):
        self.queue.append(work)
        if self.hurries():
            self._wait()

    def _wait(self):
        while self.queue:
            self.queue.popleft()()

    def _compute(self, rows, last, drawn):
        for row in rows:
            digest = self._digest_in(row.slot)
            token_ids = [last[row.sequence]] if row.token_ids is None else row.token_ids
            for place, token in zip(row.places, token_ids, strict=True):
                assert token >= 0 or VIRTUALS[digest].computed
                self.pages[self._page(row.blocks, place)] = (digest, token)
        for row in rows:
            if row.yields:
                pages = [self._page(row.blocks, place) for place in range(row.places.stop)]
                drawn[row.sequence] = next_token([self.pages[page] for page in pages])

    def _collect(self, rows, drawn):
        self.under_way.remove(rows)
        self._wait()
        if self.chance(0.01):
            raise torch.OutOfMemoryError
        yielding = [row.sequence for row in rows if row.yields]
        return [
            NonFinite() if self.chance(0.01) else SampledToken(drawn[sequence])
            for sequence in yielding
        ]

    def _fill(self, slot, blocks, first):
        digest = self._digest_in(slot)
        assert not VIRTUALS[digest].computed
        for place in range(first, VIRTUALS[digest].tokens):
            self.pages[self._page(blocks, place)] = (digest, -1 - place)

    def _page(self, blocks, place):
        return blocks[place // BLOCK_SIZE], place % BLOCK_SIZE

    def _digest_in(self, slot):
        if slot is None:
            return ""
        (digest,) = [name for name, place in self.adapters.device.items() if place == slot]
        return digest


class Simulation:
    """Requests, cancellations, deadlines and failures, drawn from one seed."""

    def __init__(self, seed, link, adapters_type, ahead):
        self.random = random.Random(seed)
        self.now = 0.0
        self.faulty = True
        self.link = link
        self.adapters = adapters_type(slots=2, load_polls=self.random.randrange(4))
        self.config = EngineConfig(
            "",
            block_size=BLOCK_SIZE,
            max_num_seqs=4,
            max_num_batched_tokens=7,
            max_adapter_slots=self.adapters.slots,
        )
        self.adapters.virtuals = VIRTUALS
        self.runner = PagedRunner(self.adapters, self.chance, lambda: self.random.random() < 0.5)
        limits = Limits(VOCABULARY, MAX_MODEL_LEN, NUM_BLOCKS * BLOCK_SIZE)
        self.blocks = BlockManager(BlockAllocator(NUM_BLOCKS + 1), BLOCK_SIZE, self.runner)
        self.scheduler = Scheduler(self.config, limits, self.blocks, self.adapters)
        self.engine = Engine(
            self.link,
            Submissions(limits, seed),
            self.scheduler,
            self.blocks,
            self.adapters,
            self.runner,
            clock=lambda: self.now,
            ahead=ahead,
        )
        self.submits: dict[str, Submit] = {}
        self.cancelled: set[str] = set()

    def chance(self, probability):
        return self.faulty and self.random.random() < probability

    def run(self):
        for _ in range(FAULTY_STEPS):
            self._disturb()
            self._step()
        self.faulty = False
        self.adapters.broken.clear()
        for _ in range(QUIET_STEPS):
            if not self.scheduler.running and not self.scheduler.waiting:
                break
            self._step()
        self.engine.settle()
        assert not self.blocks.num_used and not self.adapters.leases.total()
        self._check_answers()

    def _disturb(self):
        if self.chance(0.4):
            self._submit()
        if self.submits and self.chance(0.1):
            request_id = self.random.choice(list(self.submits))
            self.cancelled.add(request_id)
            self.link.inbox.append(Cancel(request_id))
        if self.chance(0.1):
            self.adapters.broken[self._adapter()] = InvalidArgument("broken")
        if self.chance(0.2):
            self.adapters.broken.clear()

    def _adapter(self):
        return self.random.choice(["a", "b", "c", "d"])

    def _prompt(self):
        """Many begin alike."""
        draw = self.random
        common = range(draw.choice([0, 3, 6]))
        return (*common, *(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 6))))

    def _submit(self):
        draw = self.random
        stops = tuple(draw.sample(range(VOCABULARY), draw.choice([0, 0, 8])))
        submit = Submit(
            request_id=f"request-{len(self.submits)}",
            prompt=self._prompt(),
            sampling=Sampling(repetition_penalty=draw.choice([1.0] * 9 + [1.5])),
            stopping=Stopping(max_tokens=draw.randint(1, 10), stop_token_ids=stops),
            n=draw.choice([1, 1, 3]),
            priority=draw.choice([0, 0, 1]),
            adapter=draw.choice(["", self._adapter()]),
            deadline=draw.choice([None, None, 2.0]),
            cache_salt=draw.choice(["", "salt"]),
        )
        self.submits[submit.request_id] = submit
        self.link.inbox.append(submit)

    def _step(self):
        self.now += self.random.choice([0.01, 0.1, 1.0])
        before = len(self.link.sent)
        self.engine.step()
        self.engine.reply()
        self._check_step(self.link.sent[before:])

    def _check_step(self, sent):
        for message in sent:
            if isinstance(message, StepDone):
                assert message.stats.step_rows <= self.config.max_num_batched_tokens
        running = self.scheduler.running
        assert len(running) <= self.config.max_num_seqs
        rows = [row for rows in self.runner.under_way for row in rows]
        holders = {*running, *(row.sequence for row in rows)}
        held = {block for sequence in holders for block in sequence.blocks}
        assert self.blocks.num_used == len(held)
        assert all(row.blocks == list(row.sequence.blocks[: len(row.blocks)]) for row in rows)
        assert not any(sequence.blocks for sequence in self.scheduler.waiting)
        leases = Counter(sequence.adapter for sequence in holders if sequence.adapter)
        assert leases == self.adapters.leases
        assert all(
            sequence.slot == self.adapters.device.get(sequence.adapter) for sequence in holders
        )

    def _check_answers(self):
        assert not self.scheduler.running and not self.scheduler.waiting, "never ends"
        failed = {message.request_id for message in self.link.told(RequestFailed)}
        for request_id, submit in self.submits.items():
            tokens: dict[int, list[int]] = {}
            finished = set()
            for progress in self.link.progress(request_id):
                tokens.setdefault(progress.index, []).extend(progress.token_ids)
                if progress.finish:
                    finished.add(progress.index)
            expected = solo_run(submit)
            assert all(expected[: len(got)] == got for got in tokens.values())
            if request_id not in failed | self.cancelled:
                assert finished == set(range(submit.n))
                assert all(got == expected for got in tokens.values())


@pytest.fixture(params=[False, True], ids=["lands at once", "runs ahead"])
def ahead(request):
    return request.param


@pytest.fixture
def paged_runner() -> type[PagedRunner]:
    return PagedRunner


@pytest.fixture
def simulate(fake_link, fake_adapters):
    """Runs SEEDS simulations and returns what happened in all of them together."""

    def run(ahead):
        happened = Counter()
        for seed in range(SEEDS):
            simulation = Simulation(seed, fake_link(), fake_adapters, ahead)
            try:
                with capture_logs():
                    simulation.run()
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r}") from error
            happened["simulations"] += 1
            happened["preemptions"] += simulation.scheduler.num_preemptions
            happened["prefix hits"] += simulation.blocks.prefix_hits
            happened["followers"] += simulation.runner.followers
            happened["evictions"] += simulation.adapters.device_evictions
            happened.update(message.reason for message in simulation.link.told(RequestFailed))
        return happened

    return run
