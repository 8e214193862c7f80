"""Decides which sequences take part in the next step, and with how many tokens each."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Protocol

from deltamux.adapters.task import Call
from deltamux.adapters.traits import Traits
from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.config import EngineConfig
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.limits import Limits
from deltamux.engine.reply import adapter_error, is_full, out_of_memory_error
from deltamux.engine.sampling.logit_edits import need_tokens
from deltamux.engine.scheduling.drain import Drain
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.errors import DeltamuxError, InvalidArgument


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

    def traits(self, digest: str) -> Traits | None:
        """The adapter's, None where they are not known yet: those of a slot always are."""
        ...

    def tier(self, digest: str) -> str:
        """The closest tier that holds the adapter: "device", "host" or "disk"."""
        ...

    def blocked(self, digest: str) -> bool:
        """True while the adapter lacks nothing but a slot, and every slot is leased or pinned."""
        ...


@dataclass
class Plan:
    """The next step: who takes part, and the requests that can take part in none."""

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
        """Spends the budget on as many of the sequence's uncomputed places as it allows."""
        num_tokens = min(sequence.num_uncomputed, self.budget)
        if num_tokens:
            self.scheduled.append(Scheduled(sequence, num_tokens))
            self.budget -= num_tokens


class Scheduler:
    """Two queues in one order: larger priority first, then earlier arrival.

    A sequence in `running` holds blocks for all its places and, unless it is the base's, a
    lease on its adapter's slot. One in `waiting` holds neither. One that has ended is in neither
    queue, and holds both until no step is under way any more that reads and writes there.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: Limits,
        blocks: BlockManager,
        slots: Slots,
    ) -> None:
        self._max_num_batched_tokens = config.max_num_batched_tokens
        # Every decoding sequence can then have its token in every step.
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._max_adapter_slots = config.max_adapter_slots
        self._limits = limits
        self._blocks = blocks
        self._slots = slots
        self._drain = Drain()
        self._leaving: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def can_run_ahead(self) -> bool:
        """Whether the next step can be scheduled and launched while one is under way.

        Not where it needs on the host what that brings, nor where somebody would be preempted,
        whose blocks that one still writes to.
        """
        return self._blocks.can_grow(self.running) and not any(map(_awaits_outcome, self.running))

    def schedule(self, now: float) -> Plan:
        """The next step: running sequences first, then as many waiting ones as fit beside them."""
        plan = Plan(self._max_num_batched_tokens)
        self._continue(plan)
        self._admit(plan, now)
        return plan

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, running or waiting."""
        (self.running if sequence.blocks else self.waiting).remove(sequence)
        sequence.ended = True
        self._leaving.append(sequence)
        self.let_go()

    def let_go(self) -> None:
        """Takes back what ended sequences hold, as far as no step under way uses it."""
        for sequence in list(self._leaving):
            if not sequence.num_computing:
                self._leaving.remove(sequence)
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
            if not self._is_ending(sequence) and self._grow(sequence):
                plan.add(sequence)

    def _is_ending(self, sequence: Sequence) -> bool:
        """Whether it ends with the token that is to come, whatever that is."""
        if not sequence.num_coming:
            return False
        generated = sequence.num_generated + sequence.num_coming
        return is_full(sequence, generated, self._limits.max_model_len)

    def _grow(self, sequence: Sequence) -> bool:
        """Gets the newest token's block, preempting the last in order; False: that was itself."""
        while sequence.blocks and not self._blocks.grow(sequence):
            self._preempt(self.running[-1])
        return bool(sequence.blocks)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with all its tokens; what it computed may be lost."""
        assert not sequence.num_computing, "a step under way writes to its blocks"
        self.running.remove(sequence)
        self._release(sequence)
        self.add(sequence)
        self.num_preemptions += 1

    def _admit(self, plan: Plan, now: float) -> None:
        """Blocks are given in the queue's order; a missing adapter only delays its own requests."""
        for sequence in list(self.waiting):
            if not plan.budget or len(self.running) >= self._max_running:
                return
            if self._awaits_leader(sequence) or not plan.may_join(sequence.adapter):
                continue
            if self._is_absent(sequence.adapter, plan):
                sequence.miss_adapter(now)
                continue
            if not self._has_room(sequence, plan):
                continue
            # A block in reserve for each running sequence: without them, the newcomer would soon be
            # preempted and computed again.
            if not self._blocks.fits(sequence, reserve=len(self.running)):
                return
            if not self._limits.generates and sequence.num_places > plan.budget:
                # An encoder reads a prompt in one step; the next one has room for it.
                return
            if self._acquire(sequence, plan):
                self._start(sequence, now, plan)
                continue
            sequence.miss_adapter(now)
            if plan.joinable is None and self._slots.blocked(sequence.adapter):
                plan.joinable = self._drain.joinable(sequence, self.running, now)

    def _is_absent(self, adapter: str, plan: Plan) -> bool:
        """Without asking for it, where that is known.

        Behind as many absent adapters as there are slots, no other can come in before they have.
        """
        if adapter in plan.absent:
            return True
        if not adapter or len(plan.absent) < self._max_adapter_slots:
            return False
        return self._slots.tier(adapter) != "device"

    def _has_room(self, sequence: Sequence, plan: Plan) -> bool:
        """Looks again at the limits, now that its adapter's traits may be known."""
        traits = self._slots.traits(sequence.adapter) if sequence.adapter else None
        try:
            if traits is not None:
                sequence.begin_with(traits)
                self._check_token_ids(sequence)
            answer = 0 if sequence.pooling else sequence.stopping.max_tokens
            self._limits.check_room(sequence.num_prompt, answer, sequence.virtual.tokens)
        except InvalidArgument as error:
            plan.failed[sequence.request_id] = error
            return False
        return True

    def _check_token_ids(self, sequence: Sequence) -> None:
        vocab_size = sequence.traits.vocab_size
        if sequence.ids_below > (vocab_size or self._limits.vocab_size):
            prompt, biased = sequence.tokens[: sequence.num_prompt], sequence.sampling.logit_bias
            self._limits.check_token_ids(prompt, biased, vocab_size)

    def _acquire(self, sequence: Sequence, plan: Plan) -> bool:
        """Takes the lease on the sequence's adapter; the base needs none."""
        if not sequence.adapter:
            return True
        try:
            sequence.slot = self._slots.acquire(
                sequence.adapter, sequence.adapter_path, sequence.call
            )
        except DeltamuxError as error:
            plan.failed[sequence.request_id] = adapter_error(error)
            return False
        if sequence.slot is None:
            plan.absent.add(sequence.adapter)
        return sequence.slot is not None

    def _start(self, sequence: Sequence, now: float, plan: Plan) -> None:
        try:
            self._blocks.start(sequence)
        except Exception as error:
            # What an adapter brings to the pages is written at once, which takes memory.
            if not is_out_of_memory(error):
                raise
            self._release(sequence)
            plan.failed[sequence.request_id] = out_of_memory_error()
            return
        if sequence.admitted is None:
            sequence.admitted = now
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_order)
        plan.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        """The one place where blocks and the lease go back."""
        self._blocks.release(sequence)
        if sequence.slot is not None:
            self._slots.release(sequence.adapter)
            sequence.slot = None

    def _awaits_leader(self, sequence: Sequence) -> bool:
        """True while the first choice is still computing the prompt that this one will share."""
        leader = sequence.leader
        return leader is not None and bool(leader.blocks) and not self._blocks.has_prompt(leader)


def _awaits_outcome(sequence: Sequence) -> bool:
    """Whether its next step is made of what the one under way brings."""
    if sequence.pooling is not None:
        return sequence.num_computing > 0
    return sequence.num_coming > 0 and need_tokens(sequence.sampling)


def _order(sequence: Sequence) -> tuple[int, float, int]:
    return -sequence.priority, sequence.arrival, sequence.index
