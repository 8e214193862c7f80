"""Client text made safe for one line of a log."""

from __future__ import annotations


def printable(text: str, limit: int = 200) -> str:
    """The text, cut, with control characters escaped, so that it cannot forge a line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
