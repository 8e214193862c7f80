"""Runs the tests of the Triton forms where this process cannot: in one with the interpreter."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


# Each of its tests has the time that a test has.
@pytest.mark.timeout(1800)
def test_the_triton_forms_in_a_process_with_the_interpreter(
    triton_runs: bool, run_in_parts: Callable[..., list[str]]
) -> None:
    """Triton asks for its interpreter when a kernel is defined, which may be long ago here."""
    if triton_runs:
        pytest.skip("this process runs them itself")
    files = {*FOLDER.rglob("test_*.py")} - {Path(__file__), FOLDER / "test_ahead_of_time.py"}
    # Those that take longest, roughly, begin first, in parts that even out.
    arguments = sorted(map(str, files), key=os.path.getsize, reverse=True)
    command = [sys.executable, "-m", "pytest", "-k", "triton", "-p", "no:cacheprovider", "-rN"]
    printed = run_in_parts(command, arguments, 4, os.environ | {"TRITON_INTERPRET": "1"})
    assert all(" passed" in part for part in printed), printed
