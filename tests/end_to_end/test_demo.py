"""`deltamux demo` as a person starts it, and its exit code when an answer is wrong."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from deltamux.demo import run as demo
from deltamux.demo.server import Server
from deltamux.demo.tasks import TASKS


def test_every_adapter_answers_right_in_shared_steps(tmp_path: Path):
    """From a folder that is not the repository, as from an installed wheel."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join((str(root / "server"), str(root / "kernels")))
    done = subprocess.run(
        [sys.executable, "-m", "deltamux", "demo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "160"},
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = 2 * (len(TASKS) + 1)
    assert f"{asked} of {asked} answers right" in done.stdout
    for task in TASKS:
        assert len(re.findall(rf" {task.name} .* right *$", done.stdout, re.M)) == 2, task.name
    size = r"\d+ kB"
    assert re.search(rf" word-count +lora +4 +{size} +\d words +right", done.stdout), done.stdout
    assert re.search(rf" previous-letter +bottleneck +64 +{size} ", done.stdout), done.stdout
    steps = re.findall(r"^ +(\d+) +(\d+) *$", done.stdout, re.MULTILINE)
    assert max(int(adapters) for adapters, _ in steps) > len(TASKS) // 2, done.stdout
    assert "grpcurl" in done.stdout and "from deltamux.client import" in done.stdout


def test_a_wrong_answer_is_shown_and_fails(
    demo_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Such a server, asked through one adapter whose task is misunderstood."""
    monkeypatch.setattr(demo, "Server", lambda *arguments: nullcontext(demo_server))
    task = next(task for task in TASKS if task.name == "rot13")
    monkeypatch.setattr(demo, "TASKS", (replace(task, answer=str.swapcase),))
    monkeypatch.setenv("COLUMNS", "160")
    assert demo.run(prompts=1, seed=0) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 answers right" in shown
    assert "wrong, not " in shown


def test_what_the_server_fails_with_is_shown_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("DELTAMUX_ADAPTER", '{"a": "[bold]/[/missing]"}')
    assert demo.run(prompts=1, seed=0) == 1
    assert "--adapter a=[bold]/[/missing]: " in capsys.readouterr().out
