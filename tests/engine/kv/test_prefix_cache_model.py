"""The prefix cache against a dictionary of every token prefix, under random traces of requests."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deltamux.adapters.primitives.virtual_tokens import NO_VIRTUAL, Virtual
from deltamux.adapters.task import Call
from deltamux.adapters.traits import Traits
from deltamux.config import EngineConfig
from deltamux.engine.kv import block_manager
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.limits import Limits
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.sequence import Sequence
from deltamux.wire.messages import Sampling, Stopping

TRACES = 10_000
STEPS = 20
BLOCK_SIZE, NUM_BLOCKS = 2, 7
CONFIG = EngineConfig("", block_size=BLOCK_SIZE, max_num_seqs=3, max_num_batched_tokens=5)
LIMITS = Limits(2, 100, NUM_BLOCKS * BLOCK_SIZE)
ADAPTERS, SALTS = ("", "a", "b"), ("", "salt")

VIRTUAL = {"a": Virtual(3), "b": Virtual(4, computed=False)}

# Adapter, salt and all tokens from the first one on, the virtual ones included.
Prefix = tuple[str, str, tuple[int | str, ...]]


def prefix_of(sequence: Sequence, num_blocks: int) -> Prefix:
    tokens = (*("virtual",) * sequence.virtual.tokens, *sequence.tokens)[: num_blocks * BLOCK_SIZE]
    own = any(token != "virtual" for token in tokens)
    return sequence.adapter, sequence.cache_salt if own else "", tokens


class Slots:
    """Every adapter has a slot."""

    def acquire(self, digest: str, path: str, call: Call) -> int:
        return ADAPTERS.index(digest)

    def release(self, digest: str) -> None:
        pass

    def traits(self, digest: str) -> Traits:
        return Traits(VIRTUAL.get(digest, NO_VIRTUAL))

    def blocked(self, digest: str) -> bool:
        return False

    def fill(self, slot: int, blocks: list[int], first: int) -> None:
        """There is nothing to be filled."""


class WatchedAllocator(BlockAllocator):
    """Forgets a prefix in the very moment in which its block gets another content."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.known: dict[Prefix, int] = {}

    def allocate(self, count: int) -> list[int]:
        blocks = super().allocate(count)
        for prefix in [prefix for prefix, block in self.known.items() if block in blocks]:
            del self.known[prefix]
        return blocks


class WatchedManager(BlockManager):
    """Compares each admission with the dictionary, and enters what each step completes."""

    hits = 0

    def start(self, sequence: Sequence) -> None:
        known = self._allocator.known
        expected = []
        while (len(expected) + 1) * BLOCK_SIZE < sequence.num_places:
            block = known.get(prefix_of(sequence, len(expected) + 1))
            if block is None:
                break
            expected.append(block)
        super().start(sequence)
        assert list(sequence.blocks[: len(expected)]) == expected
        given = 0 if sequence.virtual.computed else sequence.virtual.tokens
        assert sequence.num_computed == max(len(expected) * BLOCK_SIZE, given)
        self.hits += len(expected)

    def complete(self, sequence: Sequence, count: int) -> None:
        first = sequence.num_computed // BLOCK_SIZE
        super().complete(sequence, count)
        for index in range(first, sequence.num_computed // BLOCK_SIZE):
            prefix = prefix_of(sequence, index + 1)
            self._allocator.known.setdefault(prefix, sequence.blocks[index])


class Traffic:
    """Requests that come, run and are cancelled; the sampled token is the parity of all before."""

    def __init__(self) -> None:
        self.allocator = WatchedAllocator(NUM_BLOCKS + 1)
        self.blocks = WatchedManager(self.allocator, BLOCK_SIZE, Slots())
        self.scheduler = Scheduler(CONFIG, LIMITS, self.blocks, Slots())
        self.count = 0

    def submit(self, tokens: list[int], adapter: str, salt: str, max_tokens: int) -> None:
        self.count += 1
        self.scheduler.add(
            Sequence(
                request_id=str(self.count),
                index=0,
                tokens=tokens,
                num_prompt=len(tokens),
                sampling=Sampling(),
                stopping=Stopping(max_tokens=max_tokens),
                priority=0,
                arrival=float(self.count),
                deadline=None,
                adapter=adapter,
                adapter_path="",
                cache_salt=salt,
            )
        )

    def step(self) -> None:
        plan = self.scheduler.schedule(0.0)
        for request_id in plan.failed:
            self.scheduler.cancel(request_id)
        scheduled = plan.scheduled
        sampling = [item.sequence for item in scheduled if item.yields]
        for item in scheduled:
            self.blocks.complete(item.sequence, item.num_tokens)
        for sequence in sampling:
            sequence.tokens.append(sum(sequence.tokens) % 2)
            if sequence.num_generated == sequence.stopping.max_tokens:
                self.scheduler.finish(sequence)
        self.check_blocks()

    def cancel(self, number: int) -> None:
        self.scheduler.cancel(str(number % max(self.count, 1) + 1))

    def check_blocks(self) -> None:
        held = {block for sequence in self.scheduler.running for block in sequence.blocks}
        assert self.blocks.num_used == len(held)

    def drain(self) -> None:
        for number in range(self.count):
            self.cancel(number)
        assert self.blocks.num_used == 0


def run_trace(seed: int) -> Traffic:
    draw = random.Random(seed)
    traffic = Traffic()
    for _ in range(STEPS):
        action = draw.random()
        if action < 0.4:
            tokens = [int(draw.random() < 0.2) for _ in range(draw.randint(1, 9))]
            adapter = draw.choice(ADAPTERS)
            traffic.submit(tokens, adapter, draw.choice(SALTS), draw.randint(1, 4))
        elif action < 0.9:
            traffic.step()
        else:
            traffic.cancel(draw.randrange(STEPS))
    traffic.drain()
    return traffic


def test_ten_thousand_traces() -> None:
    hits = preemptions = 0
    for seed in range(TRACES):
        try:
            traffic = run_trace(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        hits += traffic.blocks.hits
        preemptions += traffic.scheduler.num_preemptions
    assert min(hits, preemptions) > 500


class TrafficMachine(RuleBasedStateMachine):
    """The same with traces that Hypothesis draws, to have small ones of what fails."""

    @initialize()
    def start(self) -> None:
        self.traffic = Traffic()

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        adapter=st.sampled_from(ADAPTERS),
        salt=st.sampled_from(SALTS),
        max_tokens=st.integers(1, 4),
    )
    def submit(self, tokens: list[int], adapter: str, salt: str, max_tokens: int) -> None:
        self.traffic.submit(tokens, adapter, salt, max_tokens)

    @rule()
    def step(self) -> None:
        self.traffic.step()

    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        self.traffic.cancel(number)

    @invariant()
    def no_block_is_lost(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.check_blocks()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.drain()


TestTrafficMachine = TrafficMachine.TestCase
TestTrafficMachine.settings = settings(max_examples=100, stateful_step_count=30)


def _without(part: str) -> Callable[..., bytes]:
    """Keys that lack one of the things that they must depend on."""

    def key(sequence: Sequence, index: int, block_size: int) -> bytes:
        first = 0 if part != "tokens before" else index * block_size
        tokens = sequence.ids(first, (index + 1) * block_size - first)
        parts = {"adapter": sequence.adapter, "salt": sequence.cache_salt, "tokens before": tokens}
        return repr([(n, v) for n, v in parts.items() if n != part] + [tokens]).encode()

    return key


def _forgets_what_nobody_holds(self: BlockAllocator, blocks: list[int]) -> None:
    free(self, blocks)
    self.withdraw(block for block in blocks if not self.is_held(block))


free = BlockAllocator.free


@pytest.mark.parametrize("part", ["adapter", "salt", "tokens before"])
def test_it_notices_keys_that_are_too_short(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager, "block_key", _without(part))
    with pytest.raises(AssertionError, match="seed"):
        test_ten_thousand_traces()


def test_it_notices_blocks_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockAllocator, "free", _forgets_what_nobody_holds)
    with pytest.raises(AssertionError, match="seed"):
        test_ten_thousand_traces()
