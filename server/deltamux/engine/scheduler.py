"""Decides which sequences take part in the next step, and with how many tokens each."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Protocol

from deltamux.adapters.task import Call
from deltamux.config import EngineConfig
from deltamux.engine.block_allocator import BlockAllocator
from deltamux.engine.block_keys import block_key
from deltamux.engine.drain import Drain
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.errors import DeltamuxError


class Slots(Protocol):
    """What the scheduler asks of the adapter cache."""

    def acquire(self, digest: str, path: str, call: Call) -> int | None:
        """A slot with a lease on it; None: not now.

        Raises what made the adapter's load fail, or why it cannot answer the call.
        """
        ...

    def release(self, digest: str) -> None:
        """Gives one lease back."""
        ...

    def blocked(self, digest: str) -> bool:
        """True while the adapter lacks nothing but a slot, and every slot is leased or pinned."""
        ...


@dataclass
class Plan:
    """The next step: who takes part, and the requests whose adapter turned out to be unfit."""

    budget: int
    scheduled: list[Scheduled] = field(default_factory=list)
    failed: dict[str, DeltamuxError] = field(default_factory=dict)
    # Adapters that cannot be had in this step, whoever asks.
    absent: set[str] = field(default_factory=set)
    # Adapters that sequences behind a blocked one may join; None: any.
    joinable: set[str] | None = None

    def may_join(self, adapter: str) -> bool:
        return self.joinable is None or not adapter or adapter in self.joinable

    def add(self, sequence: Sequence) -> None:
        """Spends the budget on as many of the sequence's uncomputed tokens as it allows."""
        num_tokens = min(sequence.num_uncomputed, self.budget)
        if num_tokens:
            self.scheduled.append(Scheduled(sequence, num_tokens))
            self.budget -= num_tokens


class Scheduler:
    """Two queues in one order: larger priority first, then earlier arrival.

    A sequence in `running` holds blocks for all its tokens and, unless it is the base's, a
    lease on its adapter's slot. One in `waiting` holds neither.
    """

    def __init__(self, config: EngineConfig, allocator: BlockAllocator, slots: Slots) -> None:
        self._block_size = config.block_size
        self._max_num_batched_tokens = config.max_num_batched_tokens
        # Every decoding sequence can then have its token in every step.
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._allocator = allocator
        self._slots = slots
        self._drain = Drain()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        # Tokens of admitted prompts, and those of them whose blocks were found.
        self.prefix_queries = 0
        self.prefix_hits = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def schedule(self, now: float) -> Plan:
        """The next step: running sequences first, then as many waiting ones as fit beside them."""
        plan = Plan(self._max_num_batched_tokens)
        self._continue(plan)
        self._admit(plan, now)
        return plan

    def advance(self, item: Scheduled) -> None:
        """Notes what a step has computed: the blocks that it completed can be shared from now."""
        sequence = item.sequence
        first = sequence.num_computed // self._block_size
        sequence.num_computed += item.num_tokens
        for index in range(first, sequence.num_computed // self._block_size):
            key = block_key(sequence, index, self._block_size)
            self._allocator.publish(sequence.blocks[index], key)

    def distrust(self, sequence: Sequence) -> None:
        """Keeps what a running sequence has computed from all who come later."""
        self._allocator.withdraw(sequence.blocks)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, running or waiting."""
        (self.running if sequence.blocks else self.waiting).remove(sequence)
        self._release(sequence)

    def cancel(self, request_id: str, indices: tuple[int, ...] = ()) -> None:
        """Ends choices of a request: all of them when `indices` is empty."""
        for sequence in (*self.running, *self.waiting):
            if sequence.request_id == request_id and (not indices or sequence.index in indices):
                self.finish(sequence)

    def expired(self, now: float) -> set[str]:
        """Requests whose deadline has passed."""
        return {
            sequence.request_id
            for sequence in (*self.running, *self.waiting)
            if sequence.deadline is not None and sequence.deadline <= now
        }

    def next_deadline(self) -> float | None:
        return min(
            (s.deadline for s in (*self.running, *self.waiting) if s.deadline is not None),
            default=None,
        )

    def _continue(self, plan: Plan) -> None:
        """Decoding sequences first, so that a long prefill never holds up a stream."""
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed > 1):
            if self._grow(sequence):
                plan.add(sequence)

    def _grow(self, sequence: Sequence) -> bool:
        """Gets the newest token's block, preempting the last in order; False: that was itself."""
        missing = self._num_blocks(sequence) - len(sequence.blocks)
        while sequence.blocks and missing > self._allocator.num_free:
            self._preempt(self.running[-1])
        if not sequence.blocks:
            return False
        sequence.blocks += self._allocator.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with all its tokens; what it computed may be lost."""
        self.finish(sequence)
        self.add(sequence)
        self.num_preemptions += 1

    def _admit(self, plan: Plan, now: float) -> None:
        """Blocks are given in the queue's order; a missing adapter only delays its own requests."""
        for sequence in list(self.waiting):
            if not plan.budget or len(self.running) >= self._max_running:
                return
            if self._awaits_leader(sequence) or not plan.may_join(sequence.adapter):
                continue
            if sequence.adapter in plan.absent:
                sequence.miss_adapter(now)
                continue
            if not self._fits(sequence):
                return
            if self._acquire(sequence, plan):
                self._start(sequence, now)
                plan.add(sequence)
                continue
            sequence.miss_adapter(now)
            if plan.joinable is None and self._slots.blocked(sequence.adapter):
                plan.joinable = self._drain.joinable(sequence, self.running, now)

    def _fits(self, sequence: Sequence) -> bool:
        """Room for all its tokens, and for one more block of each running sequence.

        Without that reserve, the newcomer would soon be preempted and computed again.
        """
        held = sum(map(self._allocator.is_held, self._reusable_blocks(sequence)))
        missing = self._num_blocks(sequence) - held
        return missing + len(self.running) <= self._allocator.num_free

    def _acquire(self, sequence: Sequence, plan: Plan) -> bool:
        """Takes the lease on the sequence's adapter; the base needs none."""
        if not sequence.adapter:
            return True
        try:
            sequence.slot = self._slots.acquire(
                sequence.adapter, sequence.adapter_path, sequence.call
            )
        except DeltamuxError as error:
            plan.failed[sequence.request_id] = error
            return False
        if sequence.slot is None:
            plan.absent.add(sequence.adapter)
        return sequence.slot is not None

    def _start(self, sequence: Sequence, now: float) -> None:
        reused = self._reusable_blocks(sequence)
        self._allocator.share(reused)
        sequence.num_computed = len(reused) * self._block_size
        missing = self._num_blocks(sequence) - len(reused)
        sequence.blocks = reused + self._allocator.allocate(missing)
        if sequence.admitted is None:
            sequence.admitted = now
            self._count_reuse(sequence)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_order)

    def _release(self, sequence: Sequence) -> None:
        """The one place where blocks and the lease go back."""
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        if sequence.slot is not None:
            self._slots.release(sequence.adapter)
            sequence.slot = None

    def _count_reuse(self, sequence: Sequence) -> None:
        """Once a sequence; a request counts its first choice alone."""
        sequence.num_cached = sequence.num_computed
        if sequence.leader is None:
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_cached

    def _awaits_leader(self, sequence: Sequence) -> bool:
        """True while the first choice is still computing the prompt that this one will share."""
        leader = sequence.leader
        if leader is None or not leader.blocks:
            return False
        return leader.num_computed < self._num_reusable(leader.num_prompt) * self._block_size

    def _reusable_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold what the sequence begins with."""
        if sequence.pooling is not None:
            # The hidden states of all its tokens are wanted, and no block holds those.
            return []
        indices = range(self._num_reusable(sequence.num_tokens))
        return self._allocator.match(block_key(sequence, i, self._block_size) for i in indices)

    def _num_reusable(self, num_tokens: int) -> int:
        # The last token is always computed: its logits yield the next one.
        return (num_tokens - 1) // self._block_size

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-sequence.num_tokens // self._block_size)


def _order(sequence: Sequence) -> tuple[int, float, int]:
    return -sequence.priority, sequence.arrival, sequence.index
