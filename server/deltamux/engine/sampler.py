"""One pass from logits to tokens for all rows of a step."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltamux.engine.sequence import Sequence
from deltamux.wire.messages import Logprob, TokenLogprobs


@dataclass(frozen=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class NonFinite:
    """The row's logits hold NaN or infinity: the adapter overflowed, or its weights are broken."""
