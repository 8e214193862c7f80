"""What whoever makes up a step must know of an adapter before it acts."""

from __future__ import annotations

from dataclasses import dataclass

from deltamux.adapters.primitives.virtual_tokens import NO_VIRTUAL, Virtual


@dataclass(frozen=True)
class Traits:
    # What stands in front of each prompt.
    virtual: Virtual = NO_VIRTUAL
    # Tokens from whose last occurrence in a prompt on it acts; it acts everywhere without them.
    invocation: tuple[int, ...] = ()
    # It acts on so many tokens from the first one on; on all without.
    reach: int | None = None
    # Tokens that its rows know; 0: those of the base.
    vocab_size: int = 0


PLAIN = Traits()
