"""The work that every peer does: 128 token ids in, 64 out, greedy, end-of-sequence ignored."""

from __future__ import annotations

import random
from dataclasses import dataclass

PROMPT_TOKENS = 128
NEW_TOKENS = 64
MODES = ("base", "one", "distinct")
# The adapters behind the LoRA ones, of other families.
FIRST_OF_FAMILIES = 32


@dataclass(frozen=True)
class Cell:
    """A batch of `batch` requests that arrive at once.

    mode: base (no adapter), one (all the same, of rank 32), distinct (request i takes adapter i) or
    families (distinct ones too, of eight families).
    """

    mode: str
    batch: int

    @property
    def adapters(self) -> list[int | None]:
        pick = {
            "base": lambda i: None,
            "one": lambda i: 3,
            "distinct": lambda i: i,
            "families": lambda i: FIRST_OF_FAMILIES + i,
        }[self.mode]
        return [pick(i) for i in range(self.batch)]

    @property
    def prompts(self) -> list[list[int]]:
        return [prompt(i) for i in range(self.batch)]


def prompt(index: int) -> list[int]:
    rng = random.Random(f"peer-workload-{index}")
    return [rng.randrange(300, 31000) for _ in range(PROMPT_TOKENS)]


def adapter_name(index: int) -> str:
    return f"a{index:02d}"
