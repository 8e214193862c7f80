"""Steps on a CPU that only decode, recorded when such a step comes again.

For a few rows of a small model, Python and torch take as long to find out what is to be computed as
the C code takes to read a layer. From one token to the next nothing of it changes but numbers. A
step of adapters that C code finds by slot is recorded for any of them; one with others, for what is
in these slots and rows.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import structlog
import torch
from torch import Tensor

from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.base.out_of_memory import is_out_of_memory
from deltamux.engine.replay.recording import Recording
from deltamux.engine.replay.scratch import Scratch
from deltamux.engine.step.batch import StepBatch, StepInputs
from deltamux.engine.step.replays import Forward
from deltamux.engine.transfer import Upload
from deltamux_kernels import CapturedSegments, Segments

_log = structlog.get_logger(__name__)

# Steps alike before one is recorded: to record one costs about as much as three replays spare.
STEPS_BEFORE = 2
# Of what one step computes in between. Where it is more, the calls are a small part of the step.
_MOST_BYTES = 64 << 20
_MOST_STEPS = 128

# Rows, and whatever else must be as it was.
_Key = tuple[object, ...]


class _RecordedStep:
    """A step as it was run once, and may be run again for other tokens, and other adapters if it
    has `segments` for any."""

    def __init__(
        self,
        inputs: StepInputs,
        forward: Forward,
        segments: CapturedSegments | None,
        scratch: Scratch,
    ) -> None:
        """Runs it. Raises CannotRecord where it has to be run anew every time."""
        self._segments = segments
        if segments is not None:
            segments.fill(inputs.token_segments)
            inputs = replace(inputs, token_segments=segments, sampled_segments=segments)
        self._inputs = replace(
            inputs,
            input_ids=inputs.input_ids.clone(),
            position_ids=inputs.position_ids.clone(),
            slot_mapping=inputs.slot_mapping.clone(),
        )
        self._recording = Recording(scratch)
        with self._recording.record():
            self.logits = forward(self._inputs, self._inputs.sampled_rows)

    def run(self, inputs: StepInputs) -> Tensor:
        """`logits` of a step with the same key."""
        own = self._inputs
        own.input_ids.copy_(inputs.input_ids)
        own.position_ids.copy_(inputs.position_ids)
        own.slot_mapping.copy_(inputs.slot_mapping)
        for plan in own.attention.plans.values():
            plan.read(inputs.attention)
        if self._segments is not None:
            self._segments.fill(inputs.token_segments)
        self._recording.replay()
        return self.logits


class RecordedSteps:
    """The recorded steps of one runner, in float32 with C code for attention."""

    def __init__(self, forward: Forward, sites: DeviceSites, most_bytes: int = _MOST_BYTES) -> None:
        self._forward = forward
        self._sites = sites
        self._scratch = Scratch(most_bytes)
        self._upload = Upload(sites.device)
        # The one used last at the end; None where it cannot be recorded.
        self._recorded: OrderedDict[_Key, _RecordedStep | None] = OrderedDict()
        # What came last, and how often in a row.
        self._last: _Key = ()
        self._times = 0

    @torch.inference_mode()
    def run(self, step: StepBatch) -> Tensor | None:
        """Logits [S, W], float32, until the next call; None for a step that is not replayed."""
        if step.pooled or step.awaiting.size or len(step.input_ids) > len(step.sampled):
            return None
        key = self._key(step)
        if key in self._recorded:
            self._recorded.move_to_end(key)
            recorded = self._recorded[key]
            return None if recorded is None else recorded.run(step.send(self._upload))
        self._times = self._times + 1 if key == self._last else 0
        self._last = key
        return self._record(key, step) if self._times >= STEPS_BEFORE else None

    def _key(self, step: StepBatch) -> _Key:
        rows, segments = len(step.input_ids), step.token_segments
        if self._any_adapters(segments):
            return rows, self._sites.growth
        return rows, segments, *self._sites.occupants(segments.slots)

    def _any_adapters(self, segments: Segments) -> bool:
        """Whether all that these rows have is found where other adapters' would be."""
        return bool(segments) and segments.slots.isdisjoint(self._sites.eager_slots)

    def _record(self, key: _Key, step: StepBatch) -> Tensor | None:
        try:
            inputs, segments = step.send(self._upload), self._captured(step)
            recorded = _RecordedStep(inputs, self._forward, segments, self._scratch)
        except Exception as error:
            # Run eagerly, such a step fails by itself if it must.
            _log.debug("cannot record a step", rows=len(step.input_ids), error=repr(error))
            if is_out_of_memory(error):
                self._times = 0  # the next ones may find some
                return None
            recorded = None
        self._recorded[key] = recorded
        if len(self._recorded) > _MOST_STEPS:
            self._recorded.popitem(last=False)
        return None if recorded is None else recorded.logits

    def _captured(self, step: StepBatch) -> CapturedSegments | None:
        if not self._any_adapters(step.token_segments):
            return None
        rows, sites = len(step.input_ids), self._sites
        return CapturedSegments(rows, sites.num_slots, sites.device)
