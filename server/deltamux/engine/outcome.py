"""What a step brings a sequence that has reached its last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deltamux.wire.messages import Pooled, TokenLogprobs


class SampledToken(NamedTuple):
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class NonFinite:
    """Its numbers hold NaN or infinity: its adapter overflows, or is broken."""


Outcome = SampledToken | Pooled | NonFinite
