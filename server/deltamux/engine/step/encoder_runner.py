"""One step of an encoder on the device: packed forward pass of whole prompts, then pooling."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from deltamux.adapters.primitives.task_head import TaskHeadBank
from deltamux.adapters.sites.rows import Rows
from deltamux.base.encoders import padded_positions, shared_head
from deltamux.base.load import Base
from deltamux.engine.flight import Collect
from deltamux.engine.outcome import Outcome
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.batch import StepBatch, StepInputs
from deltamux.engine.step.packed_attention import PackedAttention
from deltamux.engine.step.pooler import Pooler
from deltamux.engine.transfer import Upload, to_device
from deltamux_kernels import Segments


class EncoderRunner:
    """Drives one encoder, without a cache: nothing of a prompt is kept from step to step."""

    def __init__(
        self, base: Base, rows: Rows, block_size: int, heads: TaskHeadBank | None = None
    ) -> None:
        """Without `heads`, nothing is pooled."""
        self._base = base
        self._rows = rows
        self._block_size = block_size
        self._nobody = Segments.build((), base.device)
        self._shared = shared_head(base.model)
        self._skips_padding = base.encoder is not None and base.encoder.skips_padding
        self._pooler = None if heads is None else Pooler(heads, self._run_shared)
        self._attention = PackedAttention()
        base.set_attention(self._attention)
        self._upload = Upload(base.device)

    @torch.inference_mode()
    def launch(self, scheduled: Items[Scheduled]) -> Collect:
        """Queues whole prompts, all of them to be pooled: that is done when they are collected."""
        batch = self.batch(scheduled)
        hidden = self.forward(batch)
        return lambda: self._collect(batch, hidden)

    def run(self, scheduled: Items[Scheduled]) -> list[Outcome]:
        """What each prompt comes to, in the given order."""
        return self.launch(scheduled)()

    def batch(self, scheduled: Items[Scheduled]) -> StepBatch:
        return StepBatch.build(scheduled, self._block_size, self._base.device)

    @torch.inference_mode()
    def _collect(self, batch: StepBatch, hidden: Tensor) -> list[Outcome]:
        assert self._pooler is not None
        placed = self._pooler.pool(hidden, batch.pooled)
        return [placed[place] for place in range(len(placed))]

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Hidden states [T, width] of all rows of the batch."""
        inputs = batch.send(self._upload)
        self._rows.set(batch.token_segments, self._nobody)
        self._attention.begin(batch.query_lens)
        self._base.model.base_model(
            input_ids=inputs.input_ids, position_ids=self._positions(inputs), **self._types(batch)
        )
        return self._base.last_hidden.take()

    def _positions(self, inputs: StepInputs) -> Tensor:
        if not self._skips_padding:
            return inputs.position_ids
        padding = self._base.config.pad_token_id
        starts = inputs.attention.query_starts
        return padded_positions(inputs.input_ids[0], starts.long(), padding)[None]

    def _types(self, batch: StepBatch) -> dict[str, Tensor]:
        """Which of its two texts each token belongs to, where a prompt has two."""
        sequences = [item.sequence for item in batch.pooled]
        if not any(sequence.token_types for sequence in sequences):
            return {}
        types = [s.token_types or (0,) * s.num_prompt for s in sequences]
        return {"token_type_ids": to_device(np.concatenate(types), self._base.device)[None]}

    def _run_shared(self, rows: Tensor, segments: Segments) -> Tensor:
        assert self._shared is not None
        self._rows.set(self._nobody, segments)
        return self._shared(rows.to(self._base.dtype))
