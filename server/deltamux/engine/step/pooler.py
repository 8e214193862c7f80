"""From the hidden states of prompts to embeddings and the scores of task heads, chunk by chunk.

A prompt may come in several steps. What each brings is kept by the position of its first token, so
that a chunk that is computed again, after a preemption or for want of memory, counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from itertools import accumulate, groupby
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltamux.adapters.primitives.task_head import HeadPlan, Scoring, TaskHeadBank
from deltamux.base.task_heads import Pooling
from deltamux.engine.outcome import NonFinite
from deltamux.engine.sequence import Sequence
from deltamux.engine.step.batch import PooledRows
from deltamux.engine.transfer import to_device
from deltamux.wire.messages import Embed, Pooled
from deltamux_kernels import Segments

# Pooled rows [n, width] to as many, each with the adapter of its segment.
SharedHead = Callable[[Tensor, Segments], Tensor]

_SCORINGS: Mapping[Scoring, Callable[[Tensor], Tensor]] = {
    "none": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
}


class Pooler:
    """Belongs to one runner; forgets a sequence when it ends.

    Until then it keeps what it has of it: the last step may be run again, for want of memory.
    """

    def __init__(self, heads: TaskHeadBank, shared: SharedHead | None = None) -> None:
        """`shared` is the base's own part of its heads, where it has one."""
        self._heads = heads
        self._shared = shared
        # Of each sequence, by the position of a chunk's first token.
        self._chunks: WeakKeyDictionary[Sequence, dict[int, Tensor]] = WeakKeyDictionary()

    def pool(self, hidden: Tensor, pooled: Items[PooledRows]) -> dict[int, Pooled | NonFinite]:
        """Outcomes by place, of the sequences whose prompt ends in this step.

        `hidden` [T, width] are all rows of the step; `pooled` come in the order of their slots.
        """
        for item in pooled:
            self._keep(item, hidden[item.start : item.end])
        ended = {item.place: item.sequence for item in pooled if item.place is not None}
        rows = {place: self._reduced(sequence) for place, sequence in ended.items()}
        embedded = [place for place, s in ended.items() if isinstance(s.pooling, Embed)]
        outcomes: dict[int, Pooled | NonFinite] = {}
        if embedded:
            vectors = _embeddings(
                torch.cat([rows.pop(place) for place in embedded]),
                [ended[place] for place in embedded],
            )
            outcomes |= zip(embedded, vectors, strict=True)
        self._run_shared(rows, ended)
        for slot, places in groupby(rows, lambda place: ended[place].slot):
            outcomes |= self._scores(slot, {place: rows[place] for place in places})
        return outcomes

    def _keep(self, item: PooledRows, rows: Tensor) -> None:
        """What the sequence's rows of this step contribute."""
        sequence, first = item.sequence, item.first
        if first == 0:
            self._chunks[sequence] = {}
        match self._rule(sequence):
            case "mean":
                picked = rows.float().sum(0, keepdim=True)
            case "all":
                picked = rows
            case "first" | "last" as rule:
                wanted = 0 if rule == "first" else self._last(sequence)
                picked = rows[max(wanted - first, 0) : max(wanted + 1 - first, 0)]
        # A view would hold all rows of the step.
        self._chunks[sequence][first] = picked.clone() if item.place is None else picked

    def _reduced(self, sequence: Sequence) -> Tensor:
        """What the sequence's chunks come to: [1, width], or [tokens, width]."""
        chunks = self._chunks[sequence]
        rows = torch.cat([chunks[first] for first in sorted(chunks)])
        if self._rule(sequence) == "mean":
            return rows.sum(0, keepdim=True) / len(sequence.tokens)
        return rows

    def _run_shared(self, rows: dict[int, Tensor], sequences: Mapping[int, Sequence]) -> None:
        """Takes rows through the base's part of the heads that build on it."""
        places = [place for place in rows if self._plan(sequences[place]).shared]
        if not places:
            return
        assert self._shared is not None, "such heads are refused when they are loaded"
        lengths = [len(rows[place]) for place in places]
        ends = accumulate(lengths)
        spans = [
            (slot, end - length, end)
            for place, length, end in zip(places, lengths, ends, strict=True)
            if (slot := sequences[place].slot) is not None
        ]
        stacked = torch.cat([rows[place] for place in places])
        computed = self._shared(stacked, Segments.build(spans, stacked.device))
        rows.update(zip(places, computed.split_with_sizes(lengths), strict=True))

    def _scores(
        self, slot: int | None, rows: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, Pooled | NonFinite]]:
        """Of sequences with the same head, by place."""
        assert slot is not None, "the base has no task head"
        plan, given = self._heads.plans[slot], torch.cat(list(rows.values()))
        logits = self._heads.logits(given, slot).float()
        scores = _SCORINGS[plan.scoring](logits).cpu()
        lengths = [len(own) for own in rows.values()]
        pieces = zip(
            rows,
            logits.cpu().split_with_sizes(lengths),
            scores.split_with_sizes(lengths),
            strict=True,
        )
        for place, own_logits, own_scores in pieces:
            finite = bool(own_logits.isfinite().all())
            yield (
                place,
                Pooled(_bytes(own_logits), _bytes(own_scores), plan.labels)
                if finite
                else NonFinite(),
            )

    def _rule(self, sequence: Sequence) -> Pooling:
        if isinstance(sequence.pooling, Embed):
            return sequence.pooling.pooling
        return self._plan(sequence).pooling

    def _last(self, sequence: Sequence) -> int:
        """Position of the last token; for a head, as transformers does, that is no padding."""
        last = len(sequence.tokens) - 1
        if isinstance(sequence.pooling, Embed):
            return last
        padding = self._plan(sequence).pad_token_id
        return next((place for place in range(last, 0, -1) if sequence.tokens[place] != padding), 0)

    def _plan(self, sequence: Sequence) -> HeadPlan:
        assert sequence.slot is not None, "the base has no task head"
        return self._heads.plans[sequence.slot]


def _embeddings(vectors: Tensor, sequences: Items[Sequence]) -> Iterable[Pooled | NonFinite]:
    """`vectors` [sequences, width], of unit length where a sequence asks for it."""
    vectors = vectors.float()
    wanted = np.array([isinstance(s.pooling, Embed) and s.pooling.normalize for s in sequences])
    unit = to_device(wanted, vectors.device)[:, None]
    for vector in torch.where(unit, functional.normalize(vectors), vectors).cpu():
        yield Pooled(_bytes(vector)) if bool(vector.isfinite().all()) else NonFinite()


def _bytes(tensor: Tensor) -> bytes:
    numbers: bytes = tensor.numpy().tobytes()
    return numbers
