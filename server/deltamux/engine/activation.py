"""Adapters that sleep until a prompt invokes them (aLoRA)."""

from __future__ import annotations

import sys

NEVER = sys.maxsize


def first_adapted(prompt: list[int], invocation: tuple[int, ...]) -> int:
    """The first token of a prompt that its adapter computes.

    As in PEFT: where the invocation last occurs in it, whatever is generated later; NEVER where it
    does not occur. All before is computed as the base's.
    """
    if not invocation:
        return 0
    length, wanted = len(invocation), list(invocation)
    for place in range(len(prompt) - length, -1, -1):
        if prompt[place : place + length] == wanted:
            return place
    return NEVER
