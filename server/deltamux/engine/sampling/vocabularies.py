"""Rows of one step that know other tokens than the base's."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from deltamux.engine.sampling.sampler import Draw, Drawn, sample
from deltamux.engine.sequence import Scheduled
from deltamux.engine.transfer import to_device


def sample_own(logits: Tensor, shares: Rows[Scheduled], known: int) -> Draw:
    """`sample`, where each row of `logits` [S, W] has the columns of its own vocabulary and no
    other: the first `known` unless its adapter tells.

    Nothing that a row adds up depends on how many columns another one has.
    """
    sizes = [share.sequence.traits.vocab_size or known for share in shares]
    if all(size == logits.shape[1] for size in sizes):
        return sample(logits, shares)
    tokens = torch.empty(len(shares), dtype=torch.int64, device=logits.device)
    draws: list[tuple[list[int], Draw]] = []
    for size in sorted(set(sizes)):
        rows = [row for row, own in enumerate(sizes) if own == size]
        places = to_device(np.array(rows), logits.device)
        draw = sample(logits[places, :size], [shares[row] for row in rows])
        tokens[places] = draw.tokens
        draws.append((rows, draw))

    def in_order() -> Drawn:
        outcomes = dict(pair for rows, own in draws for pair in zip(rows, own.wait(), strict=True))
        return [outcomes[row] for row in range(len(shares))]

    return Draw(tokens, in_order)
