"""The engine's loop.

One step:

1. receive    the front end's messages, the loader's news, the deadlines that have passed; until
              any come, what is worth doing while nobody asks for anything
2. schedule   which sequences run, and how many tokens of each
3. launch     one forward pass over all of them, then sampling and pooling: queued on the device
4. reply      one message with everything that the step before produced, unless it was sent
5. land       wait for the device
6. update     the sequences with their new tokens; those that end give up blocks and lease

Where the engine runs ahead, 5 and 6 are of the step before, so that the device has the next one
when it is done with that. They are of this step too, and the device waits until 3 of the next one,
where that cannot be scheduled without what this one brings. What a sequence that ends holds goes
back once it is in no step under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from deltamux.engine.flight import Runner
from deltamux.engine.flights import Flights
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.outcome import NonFinite, SampledToken
from deltamux.engine.parts import Ran
from deltamux.engine.reply import admission, finish_reason, non_finite_error, out_of_memory_error
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.sequence import Sequence
from deltamux.engine.submission import Submissions
from deltamux.errors import DeadlineExceeded, DeltamuxError
from deltamux.store.memory.adapter_cache import AdapterCache
from deltamux.wire.channel import EngineEnd
from deltamux.wire.messages import (
    Cancel,
    DropAdapter,
    FromEngine,
    LoadAdapter,
    PinAdapter,
    Pooled,
    Progress,
    RequestFailed,
    Shutdown,
    Stats,
    StepDone,
    Submit,
    ToEngine,
)

# What may as well be done while nobody asks for anything; whoever does meanwhile waits for it.
Chore = Callable[[], None]
# The next one; None where nothing is left to do.
NextChore = Callable[[], Chore | None]
# Seconds without news before one: a client that asks again once it is answered is not to wait.
_LULL = 0.1


def no_chore() -> None:
    """Where there is never anything to do at rest."""


class Engine:
    """Owns nothing but the order of things; an exception out of `step` is a bug and ends it."""

    def __init__(
        self,
        link: EngineEnd,
        submissions: Submissions,
        scheduler: Scheduler,
        blocks: BlockManager,
        adapters: AdapterCache,
        runner: Runner,
        clock: Callable[[], float] = time.monotonic,
        ahead: bool = False,
        next_chore: NextChore = no_chore,
    ) -> None:
        """Runs `ahead` of a device that computes beside the host."""
        self._link = link
        self._submissions = submissions
        self._scheduler = scheduler
        self._blocks = blocks
        self._adapters = adapters
        self._flights = Flights(runner, not submissions.limits.generates, clock)
        self._clock = clock
        self._ahead = ahead
        self._next_chore = next_chore
        # What the front end is to be told, in this order.
        self._outbox: list[FromEngine] = []
        self._idle = True
        self.stopped = False

    def run(self) -> None:
        """Steps until the front end says Shutdown; then lets the threads end that load adapters."""
        while not self.stopped:
            self.step()
        self.settle()
        self._adapters.close()

    def step(self) -> None:
        self._receive()
        plan = self._scheduler.schedule(self._clock())
        for request_id, error in plan.failed.items():
            self._fail(request_id, error)
        launched = self._flights.launch(plan.scheduled)
        self.reply()
        self._idle = not (self._flights or plan.failed)
        if not self._flights:
            self._tell(Ran(), 0.0)
        while self._flights and not (launched and self._may_stay()):
            self._land()
        # At once, unless the device waits for the next launch.
        if self._flights or not plan.scheduled:
            self.reply()

    def settle(self) -> None:
        """Waits for what is under way, and tells what came of it."""
        while self._flights:
            self._land()
        self.reply()

    def reply(self) -> None:
        """Sends all that has come up since the last time."""
        for message in self._outbox:
            self._link.send(message)
        self._outbox.clear()

    def _receive(self) -> None:
        self._await_news()
        for message in self._link.receive():
            self._handle(message)
        self._outbox += self._adapters.poll()
        for request_id in self._scheduler.expired(self._clock()):
            self._fail(request_id, DeadlineExceeded("the deadline has passed"))

    def _await_news(self) -> None:
        while self._is_at_rest() and (chore := self._next_chore()) and not self._link.wait(_LULL):
            chore()
        self._link.wait(self._patience())

    def _is_at_rest(self) -> bool:
        """Whether nothing runs, nobody waits, and no adapter is on its way."""
        return self._idle and not self._scheduler.waiting and not self._adapters.pending_loads

    def _may_stay(self) -> bool:
        """Whether what was launched last may be under way when the next step is scheduled."""
        return self._ahead and len(self._flights) == 1 and self._scheduler.can_run_ahead()

    def _land(self) -> None:
        ran, seconds = self._flights.land()
        progress = self._update(ran)
        self._scheduler.let_go()
        self._tell(ran, seconds, progress)

    def _update(self, ran: Ran) -> tuple[Progress, ...]:
        """Of those that have not ended meanwhile."""
        for item in ran.computed:
            if not item.sequence.ended:
                self._blocks.complete(item.sequence, item.num_tokens)
        yielding = [item.sequence for item in ran.computed if item.yields]
        rows = [
            (sequence, outcome)
            for sequence, outcome in zip(yielding, ran.outcomes, strict=True)
            if not sequence.ended
        ]
        errors: dict[str, DeltamuxError] = {}
        if ran.starved is not None:
            errors[ran.starved.request_id] = out_of_memory_error()
        for sequence, outcome in rows:
            if isinstance(outcome, NonFinite):
                self._blocks.distrust(sequence)
                errors[sequence.request_id] = non_finite_error(sequence)
        for request_id, error in errors.items():
            self._fail(request_id, error)
        return tuple(
            self._advance(sequence, outcome)
            for sequence, outcome in rows
            if not isinstance(outcome, NonFinite) and not sequence.ended
        )

    def _tell(self, ran: Ran, seconds: float, progress: tuple[Progress, ...] = ()) -> None:
        self._outbox.append(StepDone(progress, self._stats(ran, seconds)))

    def _stats(self, ran: Ran, step_seconds: float) -> Stats:
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._blocks.num_used,
            kv_blocks_total=self._blocks.num_total,
            preemptions=self._scheduler.num_preemptions,
            prefix_queries=self._blocks.prefix_queries,
            prefix_hits=self._blocks.prefix_hits,
            step_rows=sum(item.num_tokens for item in ran.computed),
            step_adapters=len({item.sequence.adapter for item in ran.computed} - {""}),
            step_seconds=step_seconds,
            device_hits=self._adapters.device_hits,
            host_hits=self._adapters.host_hits,
            misses=self._adapters.misses,
            device_evictions=self._adapters.device_evictions,
            host_evictions=self._adapters.host_evictions,
        )

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                self._scheduler.cancel(message.request_id, message.indices)
            case LoadAdapter():
                self._adapters.load(message.digest, message.path, message.to_device, message.pinned)
            case PinAdapter():
                self._adapters.pin(message.digest, message.path, message.pinned)
            case DropAdapter():
                self._adapters.drop(message.digest)
            case Shutdown():
                self.stopped = True

    def _submit(self, submit: Submit) -> None:
        tier = self._adapters.tier(submit.adapter) if submit.adapter else ""
        try:
            sequences = self._submissions.sequences(submit, self._clock(), tier)
        except DeltamuxError as error:
            self._fail(submit.request_id, error)
            return
        for sequence in sequences:
            self._scheduler.add(sequence)

    def _advance(self, sequence: Sequence, outcome: SampledToken | Pooled) -> Progress:
        if isinstance(outcome, Pooled):
            self._scheduler.finish(sequence)
            return Progress(
                request_id=sequence.request_id,
                index=sequence.index,
                finish="stop",
                first=admission(sequence),
                pooled=outcome,
            )
        sequence.tokens.append(outcome.token_id)
        finish = finish_reason(sequence, self._submissions.limits.max_model_len)
        if finish:
            self._scheduler.finish(sequence)
        return Progress(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=(outcome.token_id,),
            logprobs=() if outcome.logprobs is None else (outcome.logprobs,),
            finish=finish,
            first=admission(sequence) if sequence.num_generated == 1 else None,
        )

    def _fail(self, request_id: str, error: DeltamuxError) -> None:
        self._scheduler.cancel(request_id)
        self._outbox.append(
            RequestFailed(
                request_id,
                error.code,
                error.reason,
                error.message,
                error.retry_after,
                error.field,
            )
        )

    def _patience(self) -> float | None:
        """Seconds to wait for news: none while there is work, else until the next deadline."""
        if not self._idle:
            return 0.0
        deadline = self._scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - self._clock())
