"""The engine's loop around a runner without a model, and what a test does to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deltamux.config import EngineConfig
from deltamux.engine.engine import Engine
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.limits import Limits
from deltamux.engine.outcome import SampledToken
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.submission import Submissions
from deltamux.wire.messages import Sampling, Stopping, Submit

STOP = 9
CONFIG = EngineConfig("", block_size=4, max_num_seqs=8, max_num_batched_tokens=16)
LIMITS = Limits(vocab_size=100, max_model_len=32, kv_cache_tokens=80)


class Runner:
    """Each sequence's next token is its length, unless `outcome` decides otherwise."""

    def __init__(self):
        self.outcome = lambda sequence: SampledToken(50 + sequence.num_generated, None)
        # What the next step raises, when it is launched and when it is collected.
        self.errors = {}
        # What happens while a step is under way: as it begins, and before it ends.
        self.launched = self.landing = lambda: None

    def launch(self, scheduled):
        self._raise("launch")
        self.launched()
        return lambda: self._collect(scheduled)

    def _collect(self, scheduled):
        self.landing()
        self._raise("collect")
        return [self.outcome(item.sequence) for item in scheduled if item.yields]

    def _raise(self, when):
        if when in self.errors:
            raise self.errors.pop(when)


class Setup:
    stop_token = STOP

    def __init__(self, link, adapters, prefixes, ahead, num_blocks=20):
        self.now = 100.0
        self.link, self.runner, self.adapters = link, Runner(), adapters
        self.prefixes = prefixes
        # What there is to do at rest.
        self.chores = []
        self.blocks = BlockManager(BlockAllocator(num_blocks + 1), CONFIG.block_size, prefixes)
        self.scheduler = Scheduler(CONFIG, LIMITS, self.blocks, adapters)
        self.engine = Engine(
            self.link,
            Submissions(LIMITS, seed=0),
            self.scheduler,
            self.blocks,
            adapters,
            self.runner,
            clock=lambda: self.now,
            ahead=ahead,
            next_chore=lambda: self._do if self.chores else None,
        )

    def _do(self):
        self.chores.pop(0)()

    def steps(self, *messages, times=1):
        """Without waiting for what is under way behind them."""
        self.link.inbox += messages
        for _ in range(times):
            self.engine.step()

    def step(self, *messages, times=1):
        """With what the last step brought, which would be sent by the next one."""
        self.steps(*messages, times=times)
        self.engine.settle()

    def is_empty(self):
        return (
            not self.scheduler.running
            and not self.scheduler.waiting
            and not self.blocks.num_used
            and not self.adapters.leases.total()
        )


@pytest.fixture(params=[False, True], ids=["lands at once", "runs ahead"])
def setup(request, fake_link, fake_adapters, fake_prefixes):
    def make(slots=2, load_polls=0):
        adapters = fake_adapters(slots, load_polls)
        return Setup(fake_link(), adapters, fake_prefixes(), ahead=request.param)

    return make


@pytest.fixture
def flying(fake_link, fake_adapters, fake_prefixes):
    """An engine that runs ahead, and what its runner did, in order."""

    def make(num_blocks=20):
        served = Setup(fake_link(), fake_adapters(2), fake_prefixes(), True, num_blocks)
        events = []
        served.runner.launched = lambda: events.append("launch")
        served.runner.landing = lambda: events.append("land")
        return served, events

    return make


@pytest.fixture
def submit() -> Callable[..., Submit]:
    def make(
        request_id="r", prompt=(1, 2, 3), max_tokens=3, min_tokens=0, sampling=None, **fields
    ) -> Submit:
        stopping = Stopping(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=(STOP,))
        return Submit(request_id, tuple(prompt), sampling or Sampling(seed=1), stopping, **fields)

    return make
