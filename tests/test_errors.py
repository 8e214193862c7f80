"""What is said of a library's error in one line."""

from __future__ import annotations

import pytest

from deltamux.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  too large\nby far"), "too large"),
        (KeyError("gelu"), "KeyError: 'gelu'"),
        (MemoryError(), "MemoryError"),
        (
            Exception("In field 'x':\n    TypeError: no int\nmore"),
            "In field 'x': TypeError: no int",
        ),
        (OSError("it ends so:"), "it ends so:"),
    ],
)
def test_the_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
