"""How the scores of attention become weights."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Scoring(NamedTuple):
    """The same for every sequence of a call; `paged_attention` says what each does."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None  # [Hq]

    @property
    def plain(self) -> bool:
        """Whether torch's own attention can do it, a window being only a mask."""
        return self.softcap is None and self.sinks is None
