"""Which rows of the running step belong to which device slot."""

from __future__ import annotations

import torch

from deltamux_kernels.segments import Segments


class Rows:
    """The step's truth: one object, refilled before each step, that every site of a model holds.

    `tokens` speaks of all rows of the step, `sampled` of the rows that reach a head of the base.
    A row in no segment has no adapter. `mix` is another object whenever other slots take part, or
    a slot has another adapter: what a site chose for one mix holds as long as it is the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens = self.sampled = Segments.build((), device)
        self.slots: frozenset[int] = frozenset()
        self.mix = object()

    def set(self, token_segments: Segments, sampled_segments: Segments) -> None:
        """Describes the next step."""
        if token_segments is self.tokens and sampled_segments is self.sampled:
            return
        self.tokens = token_segments
        self.sampled = sampled_segments
        self.slots = token_segments.slots | sampled_segments.slots
        self.changed()

    def changed(self) -> None:
        """To be called when a slot was filled or emptied."""
        self.mix = object()
