"""Times what the engine does itself in a decode step: all but the model and the sampler, on a CPU.

python bench/bench_host.py [--sequences 32 256] [--context 600] [--device 5] [--rounds 300]
                           [--json out.json]

`build` makes the arrays of a step, `engine` is the loop around it: receive, schedule, update and
reply, with messages encoded but not sent, and a runner that draws the same token every time.

`exposed` is how long a device that is done with a step waits for the next one to be launched, and
`exposed ahead` the same where the engine runs ahead of it. The device is a clock, for which each
step takes `--device` milliseconds; to launch one is to make its arrays. What a real launch takes on
the host comes on top: on either, of which the second is hidden as long as all of the host's
work is shorter than a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import torch

from deltamux.config import EngineConfig
from deltamux.engine.engine import Engine
from deltamux.engine.flight import Collect, Runner
from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_manager import BlockManager
from deltamux.engine.limits import Limits
from deltamux.engine.outcome import Outcome, SampledToken
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.scheduling.scheduler import Scheduler
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.batch import StepBatch
from deltamux.engine.step.last_draw import NOTHING_DRAWN, LastDraw
from deltamux.engine.submission import Submissions
from deltamux.wire.messages import FromEngine, Sampling, Stopping, Submit, ToEngine

BLOCK, SLOTS, MOST_TOKENS = 16, 32, 4096
CPU = torch.device("cpu")


class Parrot:
    """A runner that computes nothing."""

    def launch(self, scheduled: Items[Scheduled]) -> Collect:
        return lambda: [SampledToken(5) for item in scheduled if item.yields]


class Clock:
    """A runner of a device that takes so many seconds for every step."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = NOTHING_DRAWN
        # When the device is done with all that it was given.
        self._done = 0.0
        # For how long it then had nothing to do, before each step.
        self.waits: list[float] = []

    def launch(self, scheduled: Items[Scheduled]) -> Collect:
        batch = StepBatch.build(scheduled, BLOCK, CPU, self._last)
        self._last = LastDraw(batch.sampled, torch.zeros(len(batch.sampled), dtype=torch.int64))
        now = time.perf_counter()
        self.waits.append(max(0.0, now - self._done))
        self._done = max(now, self._done) + self._seconds
        return partial(self._collect, scheduled, self._done)

    def _collect(self, scheduled: Items[Scheduled], done: float) -> list[Outcome]:
        while time.perf_counter() < done:
            pass
        return [SampledToken(5) for item in scheduled if item.yields]


class Link:
    """Hands over what is put into it, and encodes what it is given."""

    def __init__(self, inbox: list[ToEngine]) -> None:
        self._inbox = inbox
        self._encode = msgspec.msgpack.Encoder().encode

    def wait(self, timeout: float | None) -> None:
        """There is always something to do."""

    def receive(self) -> list[ToEngine]:
        received, self._inbox = self._inbox, []
        return received

    def send(self, message: FromEngine) -> None:
        self._encode(message)


def decoding_step(sequences: int, context: int) -> Callable[[], object]:
    """Builds a step in which every sequence has its next token; three of four have an adapter."""
    blocks = -(-context // BLOCK)
    scheduled = []
    for row in range(sequences):
        own = list(range(1 + row * blocks, 1 + (row + 1) * blocks))
        sequence = trial_sequence(row, [7] * context, own, Sampling())
        sequence.num_computed = context - 1
        sequence.slot = row % SLOTS if row % 4 else None
        scheduled.append(Scheduled(sequence, 1))
    return lambda: StepBatch.build(scheduled, BLOCK, CPU)


def running_engine(sequences: int, context: int, runner: Runner, ahead: bool) -> Engine:
    """With as many requests, each of them decoding."""
    tokens = sequences * (context + MOST_TOKENS)
    counters = dict.fromkeys(
        ("device_hits", "host_hits", "misses", "device_evictions", "host_evictions"), 0
    )
    adapters = cast(Any, SimpleNamespace(poll=list, **counters))
    blocks = BlockManager(BlockAllocator(tokens // BLOCK + 1), BLOCK, cast(Any, None))
    limits = Limits(32000, context + MOST_TOKENS, tokens)
    config = EngineConfig(
        "", max_num_seqs=sequences, max_num_batched_tokens=tokens, block_size=BLOCK
    )
    submits: list[ToEngine] = [
        Submit(
            request_id=f"request-{row}",
            prompt=(7,) * context,
            sampling=Sampling(),
            stopping=Stopping(max_tokens=MOST_TOKENS),
            cache_salt=str(row),
            deadline=3600.0,
        )
        for row in range(sequences)
    ]
    scheduler = Scheduler(config, limits, blocks, adapters)
    engine = Engine(
        cast(Any, Link(submits)),
        Submissions(limits, 0),
        scheduler,
        blocks,
        adapters,
        runner,
        ahead=ahead,
    )
    engine.step()
    assert len(scheduler.running) == sequences
    return engine


@torch.inference_mode()
def microseconds(work: Callable[[], object], rounds: int) -> float:
    """Median of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


@torch.inference_mode()
def exposed(sequences: int, context: int, seconds: float, ahead: bool, rounds: int) -> float:
    """Median microseconds for which the device waits between two steps."""
    clock = Clock(seconds)
    engine = running_engine(sequences, context, clock, ahead)
    engine.step()
    clock.waits.clear()
    for _ in range(rounds):
        engine.step()
    return 1e6 * statistics.median(clock.waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--device", type=float, default=5.0, help="milliseconds of a step")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for sequences in args.sequences:
        engine = running_engine(sequences, args.context, Parrot(), ahead=False)
        waits = partial(exposed, sequences, args.context, args.device / 1000, rounds=args.rounds)
        results[sequences] = {
            "build": microseconds(decoding_step(sequences, args.context), args.rounds),
            "engine": microseconds(engine.step, args.rounds),
            "exposed": waits(ahead=False),
            "exposed ahead": waits(ahead=True),
        }
        found = "  ".join(f"{name} {value:.0f}" for name, value in results[sequences].items())
        print(f"{sequences:4} sequences, microseconds a step: {found}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
