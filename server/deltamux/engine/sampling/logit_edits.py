"""What requests ask to change in their logits before a token is chosen.

In this order, as in transformers' generate: bias, repetition penalty, presence and frequency
penalties, stop tokens held back by min_tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltamux.engine.sequence import Scheduled
from deltamux.engine.transfer import Array, to_device
from deltamux.wire.messages import Sampling


def edit_logits(logits: Tensor, shares: Rows[Scheduled]) -> Tensor:
    """Logits [S, V], float32, as the shares of the rows want them; the input stays as it is.

    Where a share's edits `need_tokens`, all that come before its own have come.
    """
    edited = [row for row, share in enumerate(shares) if _wants_edits(share)]
    if not edited:
        return logits
    logits = logits.clone()
    chosen = [(row, shares[row]) for row in edited]
    if cells := _gather(_biases(chosen), logits.device):
        logits[cells.rows, cells.tokens] += cells.values
    if cells := _gather(_repetitions(chosen), logits.device):
        seen = logits[cells.rows, cells.tokens]
        penalised = torch.where(seen < 0, seen * cells.values, seen / cells.values)
        logits[cells.rows, cells.tokens] = penalised
    if cells := _gather(_generated(chosen), logits.device):
        logits[cells.rows, cells.tokens] -= cells.values
    if cells := _gather(_held_back(chosen, logits.shape[1]), logits.device):
        logits[cells.rows, cells.tokens] = cells.values
    return logits


def need_tokens(sampling: Sampling) -> bool:
    """Whether the edits of one token depend on which the tokens before it are."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _wants_edits(share: Scheduled) -> bool:
    sequence = share.sequence
    return (
        need_tokens(sequence.sampling) or bool(sequence.sampling.logit_bias) or _is_held_back(share)
    )


def _is_held_back(share: Scheduled) -> bool:
    """Whether it must not stop with the token that it brings."""
    min_tokens = share.sequence.stopping.min_tokens
    return min_tokens > 0 and share.generated < min_tokens


# Tokens of one row, each once, and a value for each.
_Part = tuple[int, Array, Array]


def _biases(chosen: list[tuple[int, Scheduled]]) -> Iterator[_Part]:
    for row, share in chosen:
        if bias := share.sequence.sampling.logit_bias:
            yield row, np.array(list(bias)), np.array(list(bias.values()))


def _repetitions(chosen: list[tuple[int, Scheduled]]) -> Iterator[_Part]:
    """Prompt and generated tokens alike."""
    for row, share in chosen:
        if (penalty := share.sequence.sampling.repetition_penalty) != 1.0:
            tokens = np.unique(np.array(share.sequence.tokens))
            yield row, tokens, np.full(len(tokens), penalty)


def _generated(chosen: list[tuple[int, Scheduled]]) -> Iterator[_Part]:
    """Generated tokens only: once for being present, and once more for each occurrence."""
    for row, share in chosen:
        sequence, sampling = share.sequence, share.sequence.sampling
        if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.num_generated:
            generated = np.array(sequence.tokens[sequence.num_prompt :])
            tokens, counts = np.unique(generated, return_counts=True)
            yield row, tokens, sampling.presence_penalty + sampling.frequency_penalty * counts


def _held_back(chosen: list[tuple[int, Scheduled]], vocabulary: int) -> Iterator[_Part]:
    """Without the ids that no row of logits has: some models' own end token is such a one."""
    for row, share in chosen:
        if _is_held_back(share):
            stop_token_ids = share.sequence.stopping.stop_token_ids
            reachable = [i for i in stop_token_ids if 0 <= i < vocabulary]
            tokens = np.array(reachable, dtype=np.int64)
            yield row, tokens, np.full(len(tokens), -math.inf)


@dataclass(frozen=True)
class _Cells:
    """Cells of the logits, rows [N] and tokens [N], with values [N] for them."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


def _gather(parts: Iterator[_Part], device: torch.device) -> _Cells | None:
    collected = list(parts)
    if not collected:
        return None
    rows = np.concatenate([np.full(len(tokens), row) for row, tokens, _ in collected])
    tokens = np.concatenate([tokens for _, tokens, _ in collected])
    values = np.concatenate([values for _, _, values in collected], dtype=np.float32)
    return _Cells(to_device(rows, device), to_device(tokens, device), to_device(values, device))
