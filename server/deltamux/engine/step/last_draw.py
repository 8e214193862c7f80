"""Tokens that a step reads where the step before has drawn them, before the host knows them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.engine.sequence import Scheduled, Sequence


@dataclass(frozen=True, eq=False)
class LastDraw:
    """What the step that was launched last draws, and for whom."""

    sampled: tuple[Scheduled, ...]
    tokens: Tensor  # int64 [S], on the device

    def places_of(self, sequences: Items[Sequence]) -> list[int]:
        """Where the tokens of these are among its own."""
        if not sequences:
            return []
        place_of = {item.sequence: place for place, item in enumerate(self.sampled)}
        return [place_of[sequence] for sequence in sequences]

    def fill_in(self, input_ids: Tensor, awaiting: Tensor) -> None:
        """Puts its tokens in the next step's ids, int64 [T]; queued, without waiting for them.

        `awaiting` [2, P] says in which rows, and which of the tokens.
        """
        rows, places = awaiting
        input_ids.index_copy_(0, rows, self.tokens.index_select(0, places))


NOTHING_DRAWN = LastDraw((), torch.zeros(0, dtype=torch.int64))
