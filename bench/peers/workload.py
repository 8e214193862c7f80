"""The work that every peer does: 128 token ids in, 64 out, greedy, end-of-sequence ignored.

Needs the standard library only: each peer's own interpreter imports it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PROMPT_TOKENS = 128
SHARED_TOKENS = 96
NEW_TOKENS = 64
MODES = ("base", "one", "distinct", "zipf")
# How many LoRA adapters every peer has loaded. Behind all that exist are those of other families.
ADAPTERS = 16
FIRST_OF_FAMILIES = 32


@dataclass(frozen=True)
class Cell:
    """A batch of `batch` requests that arrive at once.

    mode: base (no adapter), one (all the same, of rank 32), distinct (request i takes adapter i),
    zipf (the k-th of 16 is drawn with probability proportional to 1 / k) or families (distinct
    ones too, of eight families).
    shared_prefix: all prompts begin with the same 96 tokens.
    seed: another one gives other prompts, apart from that beginning.
    """

    mode: str
    batch: int
    shared_prefix: bool = False
    new_tokens: int = NEW_TOKENS
    seed: int = 0

    @property
    def adapters(self) -> list[int | None]:
        if self.mode == "zipf":
            weights = [1 / k for k in range(1, ADAPTERS + 1)]
            return [*random.Random("peer-zipf").choices(range(ADAPTERS), weights, k=self.batch)]
        pick = {
            "base": lambda i: None,
            "one": lambda i: 3,
            "distinct": lambda i: i,
            "families": lambda i: FIRST_OF_FAMILIES + i,
        }[self.mode]
        return [pick(i) for i in range(self.batch)]

    @property
    def prompts(self) -> list[list[int]]:
        beginning = _tokens("peer-prefix", SHARED_TOKENS) if self.shared_prefix else []
        length = PROMPT_TOKENS - len(beginning)
        return [
            beginning + _tokens(f"peer-workload-{self.seed}-{i}", length) for i in range(self.batch)
        ]


@dataclass(frozen=True)
class Run:
    """What a peer did with a cell: wall seconds in all and until every request had its first token.

    tokens: the new ones of each request.
    """

    seconds: float
    prefill_seconds: float
    tokens: list[list[int]]


def adapter_name(index: int) -> str:
    return f"a{index:02d}"


def _tokens(seed: str, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300, 31000) for _ in range(count)]
