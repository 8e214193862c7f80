"""One step on the device: packed forward pass, then sampling and pooling."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from deltamux.adapters.primitives.task_head import TaskHeadBank
from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import Base
from deltamux.engine.flight import Collect
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.outcome import Outcome
from deltamux.engine.sampling.sampler import Draw
from deltamux.engine.sampling.vocabularies import sample_own
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.attention import PagedAttention
from deltamux.engine.step.batch import StepBatch, StepInputs
from deltamux.engine.step.last_draw import NOTHING_DRAWN, LastDraw
from deltamux.engine.step.pooler import Pooler
from deltamux.engine.step.replays import Replays
from deltamux.engine.transfer import Upload


class ModelRunner:
    """Drives one base model over one KV cache. Reads sequences, never changes them."""

    def __init__(
        self, base: Base, cache: KVCache, rows: Rows, heads: TaskHeadBank | None = None
    ) -> None:
        """Without `heads`, nothing is pooled."""
        self._base = base
        self.cache = cache
        self._rows = rows
        self._pooler = None if heads is None else Pooler(heads)
        self._replays: Replays | None = None
        self._attention = PagedAttention(cache)
        base.set_attention(self._attention)
        self._upload = Upload(base.device)
        self._last = NOTHING_DRAWN

    @property
    def block_size(self) -> int:
        return self.cache.block_size

    def use(self, replays: Replays) -> None:
        """From now on, steps that these can replay are replayed."""
        self._replays = replays

    @torch.inference_mode()
    def launch(self, scheduled: Items[Scheduled]) -> Collect:
        """Queues the scheduled tokens; collected, one outcome for each that yields, in their order.

        A row whose logits are not finite is NonFinite; the other rows are not touched by it.
        """
        batch = self.batch(scheduled)
        logits = self._sampled_logits(batch)
        draw = sample_own(logits, batch.sampled, self._base.vocab_size)
        self._last = LastDraw(batch.sampled, draw.tokens)
        hidden = self._base.last_hidden.take() if batch.pooled else None
        return lambda: self._collect(batch, draw, hidden)

    def run(self, scheduled: Items[Scheduled]) -> list[Outcome]:
        """Launches a step and waits for it."""
        return self.launch(scheduled)()

    def batch(self, scheduled: Items[Scheduled]) -> StepBatch:
        """What a step of these reads: of tokens that are still to come, those it has drawn last."""
        return StepBatch.build(scheduled, self.block_size, self._base.device, self._last)

    @torch.inference_mode()
    def _collect(self, batch: StepBatch, draw: Draw, hidden: Tensor | None) -> list[Outcome]:
        placed: dict[int, Outcome] = dict(zip(batch.sampled_places, draw.wait(), strict=True))
        if hidden is not None:
            assert self._pooler is not None
            placed |= self._pooler.pool(hidden, batch.pooled)
        return [placed[place] for place in range(len(placed))]

    def _sampled_logits(self, batch: StepBatch) -> Tensor:
        replayed = None if self._replays is None else self._replays.run(batch)
        return self.forward(batch) if replayed is None else replayed

    def forward(self, batch: StepBatch, rows: Tensor | None = None) -> Tensor:
        """`logits`, in float32, of those rows of the batch, or else of the sampled ones."""
        inputs = batch.send(self._upload)
        return self.logits(inputs, inputs.sampled_rows if rows is None else rows).float()

    @torch.inference_mode()
    def logits(self, inputs: StepInputs, rows: Tensor) -> Tensor:
        """[len(rows), W], of those rows of a step; fills the KV cache.

        W is V, the base's vocabulary, unless an adapter in one of them has added tokens to it: then
        those of its rows that have fewer end in columns that mean nothing.
        """
        self._rows.set(inputs.token_segments, inputs.sampled_segments)
        self._attention.begin(inputs.attention, inputs.slot_mapping)
        output = self._base.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            logits_to_keep=rows,
        )
        logits: Tensor = output.logits[0]
        return logits
