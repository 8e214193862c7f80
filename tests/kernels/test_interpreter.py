"""Runs the tests of the Triton forms where this process cannot: in one with the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_triton_forms_in_a_process_with_the_interpreter(triton_runs: bool) -> None:
    """Triton asks for its interpreter when a kernel is defined, which may be long ago here."""
    if triton_runs:
        pytest.skip("this process runs them itself")
    folder = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(folder),
        "-k",
        "triton",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [*command, f"--deselect={__file__}", "-rN"],
        env=environment,
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout + run.stderr
