"""Which rows of the running step belong to which device slot."""

from __future__ import annotations

import torch

from deltamux_kernels.segments import Segments


class Rows:
    """The step's truth: one object, refilled before each step, that every site of a model holds.

    `tokens` speaks of all rows of the step, `sampled` of the rows that reach a head of the base.
    A row in no segment has no adapter.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens = self.sampled = Segments.build((), device)
        self.slots: frozenset[int] = frozenset()

    def set(self, token_segments: Segments, sampled_segments: Segments) -> None:
        """Describes the next step."""
        self.tokens = token_segments
        self.sampled = sampled_segments
        self.slots = token_segments.slots | sampled_segments.slots
