"""Runs prompts through the engine's own path before the first request, for the base's self-test."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Items

import structlog
import torch
from torch import Tensor

from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import Base
from deltamux.base.self_test import TOLERANCE, relative_error, self_test
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.replay.cuda_graphs import StepGraphs
from deltamux.engine.replay.recorded_steps import STEPS_BEFORE, RecordedSteps
from deltamux.engine.replay.step_buffers import StepShape
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.step.encoder_runner import EncoderRunner
from deltamux.engine.step.runner import ModelRunner
from deltamux.wire.messages import Sampling, Stopping

_log = structlog.get_logger(__name__)
_CHUNKS = 3
# Keys of so many tokens are divided among threads.
_FAR = 600


def rehearse(base: Base, block_size: int) -> None:
    """Refuses, with StartupError, a base whose packed forward differs from transformers' own."""
    if base.encoder is None:
        self_test(base, lambda prompts: packed_logits(base, prompts, block_size))
    else:
        self_test(base, lambda prompts: packed_hidden(base, prompts, block_size))


@torch.inference_mode()
def replays_agree(graphs: StepGraphs, runner: ModelRunner, base: Base, longest: int) -> bool:
    """Whether captured steps, each of other tokens than it was captured with, give what eager ones
    do. Nothing of a model's own code may have been decided once and for all.

    No sequence is longer than `longest`, for which the cache has blocks.
    """
    for shape in graphs.shapes:
        batch = runner.batch(_cut_text(shape, base.vocab_size, longest, runner.block_size))
        replayed = graphs.run(batch)
        if replayed is None:
            continue  # sequences so short cannot fill it, and their shape was not captured
        error = relative_error(replayed, runner.forward(batch), base.dtype)
        if not error <= TOLERANCE[base.dtype]:
            _log.warning(
                "a CUDA graph differs from its step, none is used",
                rows=shape.rows,
                decodes=shape.decodes,
                error=error,
            )
            return False
    return True


@torch.inference_mode()
def recorded_agree(recorded: RecordedSteps, runner: ModelRunner, base: Base, longest: int) -> bool:
    """Whether a recorded step, of other tokens at other places than it was recorded with, gives to
    the bit what an eager one does. Where the base has to be run anew every time, it gives nothing.

    No sequence is longer than `longest`, for which the cache has blocks.
    """
    far = min(longest, _FAR)
    first, second = (
        runner.batch(_next_tokens(lengths, base.vocab_size, runner.block_size))
        for lengths in ((1, min(longest, 2)), (far, 1))
    )
    # Nobody has written what these read, and in memory that was in use before there may be NaN,
    # which differs from itself.
    numbers = torch.Generator().manual_seed(0)
    for pages in (*runner.cache.keys, *runner.cache.values):
        pages[: -(-far // runner.block_size)].normal_(generator=numbers)
    for _ in range(STEPS_BEFORE + 1):
        recorded.run(first)
    replayed = recorded.run(second)
    if replayed is None:
        _log.info("decode steps of this model cannot be recorded")
        return False
    if not torch.equal(replayed, runner.forward(second)):
        _log.warning("a recorded step differs from its model, none is used")
        return False
    return True


def packed_logits(base: Base, prompts: Items[Items[int]], block_size: int) -> list[Tensor]:
    """Logits [len(prompt), V], float32, of each: in one batch, in chunks, over shuffled blocks."""
    counts = [-(-len(prompt) // block_size) for prompt in prompts]
    cache = KVCache(base.layers, sum(counts) + 1, block_size, base.dtype, base.device)
    runner = ModelRunner(base, cache, Rows(base.device))
    sequences = _sequences(prompts, counts)
    parts: list[list[Tensor]] = [[] for _ in prompts]
    for step in _steps(sequences):
        batch = runner.batch(step)
        every_row = torch.arange(len(batch.input_ids), device=base.device)
        logits = runner.forward(batch, every_row)
        lengths = [item.num_tokens for item in step]
        for item, piece in zip(step, logits.split_with_sizes(lengths), strict=True):
            parts[item.sequence.index].append(piece)
            item.sequence.num_computed += item.num_tokens
    return [torch.cat(pieces) for pieces in parts]


def packed_hidden(base: Base, prompts: Items[Items[int]], block_size: int) -> list[Tensor]:
    """An encoder's last hidden states [len(prompt), width], float32, of each: in one batch."""
    runner = EncoderRunner(base, Rows(base.device), block_size)
    sequences = _sequences(prompts, [-(-len(prompt) // block_size) for prompt in prompts])
    step = [Scheduled(sequence, sequence.num_places) for sequence in sequences]
    hidden = runner.forward(runner.batch(step))
    return list(hidden.float().split_with_sizes([item.num_tokens for item in step]))


def trial_sequence(
    index: int, prompt: Items[int], blocks: list[int], sampling: Sampling
) -> Sequence:
    """A sequence of the base that no client asked for."""
    return Sequence(
        request_id="rehearsal",
        index=index,
        tokens=list(prompt),
        num_prompt=len(prompt),
        sampling=sampling,
        stopping=Stopping(max_tokens=1),
        priority=0,
        arrival=0.0,
        deadline=None,
        adapter="",
        adapter_path="",
        cache_salt="",
        blocks=array("i", blocks),
    )


def _sequences(prompts: Items[Items[int]], counts: list[int]) -> list[Sequence]:
    free = list(range(1, sum(counts) + 1))
    random.Random(0).shuffle(free)
    return [
        trial_sequence(index, prompt, [free.pop() for _ in range(count)], Sampling())
        for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]


def _cut_text(shape: StepShape, vocab_size: int, longest: int, block_size: int) -> list[Scheduled]:
    """A step as large as the shape: one text, cut into as many sequences as it may have, each of
    which reads in the blocks of all what those before it write. Where the step need not decode,
    every other one has more to come.

    A text of more than `longest` tokens begins again.
    """
    longest, pick = min(longest, shape.rows), random.Random(0)
    rows = min(shape.rows, shape.sequences * longest)
    text = pick.choices(range(vocab_size), k=longest)
    ends = {*range(longest, rows, longest), rows}
    ends.update(pick.sample(range(1, rows), min(rows - 1, shape.sequences - len(ends))))
    start, step = 0, []
    for index, end in enumerate(sorted(ends)):
        first, last = start % longest, start % longest + end - start
        more = [0] * (index % 2 and not shape.decodes)
        blocks = list(range(-(-last // block_size)))
        sequence = trial_sequence(index, text[:last] + more, blocks, Sampling())
        sequence.num_computed = first
        step.append(Scheduled(sequence, last - first))
        start = end
    return step


def _next_tokens(lengths: Items[int], vocab_size: int, block_size: int) -> list[Scheduled]:
    """A token each of sequences of so many, which read and write in the same blocks."""
    pick = random.Random(sum(lengths))
    step = []
    for index, length in enumerate(lengths):
        blocks = list(range(-(-length // block_size)))
        text = pick.choices(range(vocab_size), k=length)
        sequence = trial_sequence(index, text, blocks, Sampling())
        sequence.num_computed = length - 1
        step.append(Scheduled(sequence, 1))
    return step


def _steps(sequences: list[Sequence]) -> Iterator[list[Scheduled]]:
    """A third of each prompt a step."""
    while waiting := [sequence for sequence in sequences if sequence.num_uncomputed]:
        yield [
            Scheduled(sequence, min(-(-sequence.num_prompt // _CHUNKS), sequence.num_uncomputed))
            for sequence in waiting
        ]
