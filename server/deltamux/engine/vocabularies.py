"""Rows of one step that know other tokens than the base's."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import numpy as np
from torch import Tensor

from deltamux.engine.sampler import Drawn, sample
from deltamux.engine.sequence import Sequence
from deltamux.engine.transfer import to_device


def sample_own(logits: Tensor, sequences: Rows[Sequence], known: int) -> Callable[[], Drawn]:
    """`sample`, where each row of `logits` [S, W] has the columns of its own vocabulary and no
    other: the first `known` unless its adapter tells.

    Nothing that a row adds up depends on how many columns another one has.
    """
    sizes = [sequence.traits.vocab_size or known for sequence in sequences]
    if all(size == logits.shape[1] for size in sizes):
        return sample(logits, sequences)
    drawn: list[tuple[list[int], Callable[[], Drawn]]] = []
    for size in sorted(set(sizes)):
        rows = [row for row, own in enumerate(sizes) if own == size]
        part = logits[to_device(np.array(rows), logits.device), :size]
        drawn.append((rows, sample(part, [sequences[row] for row in rows])))

    def in_order() -> Drawn:
        outcomes = dict(pair for rows, own in drawn for pair in zip(rows, own(), strict=True))
        return [outcomes[row] for row in range(len(sequences))]

    return in_order
