"""The reference under another Python: what crosses, and every way in which none comes back."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltamux.demo.tasks import weights_path
from deltamux.verify import alone
from deltamux.verify.alone import Question, Refused
from deltamux.verify.interpreter import Interpreter

QUESTION = Question(
    library="peft",
    adapter=str(weights_path() / "adapters" / "rot13"),
    model=str(weights_path() / "base"),
    auto_class="AutoModelForCausalLM",
    config={},
    device="cpu",
    dtype="float32",
    prompts=[[1, 2, 3], [4, 5, 6, 7, 8]],
    plain="logits",
    adapted="logits",
)


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def commands() -> str:
    """The command lines of all processes that run; those of zombies are empty."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append((process / "cmdline").read_text(errors="replace"))
    return "\n".join(found)


def test_the_answer_is_that_of_the_library_where_there_is_no_deltamux(tmp_path: Path) -> None:
    bare = (
        "import runpy, sys; sys.modules['deltamux'] = None; sys.argv = sys.argv[2:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    python = program(tmp_path / "python", f'#!/bin/sh\nexec {sys.executable} -c "{bare}" "$@"\n')
    theirs, ours = Interpreter(python, 300).ask(QUESTION), alone.answer(QUESTION)
    assert theirs.library == ours.library
    for there, here in ((theirs.plain, ours.plain), (theirs.adapted, ours.adapted)):
        assert [len(rows) for rows in there] == [3, 5]
        torch.testing.assert_close(there, here)
    assert (theirs.plain[0] - theirs.adapted[0]).abs().max() > 1


def test_a_refusal_crosses_too() -> None:
    with pytest.raises(Refused, match=r"^\S+ has no package 'adapters', which the adapter is"):
        Interpreter(sys.executable, 300).ask(replace(QUESTION, library="adapterhub"))


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "echo Traceback >&2; echo \"No module named 'torch'\" >&2; exit 1",
            "No module named 'torch'",
        ),
        ("exit 3", "it ended with exit code 3"),
        ("kill -SEGV $$", "it was ended by SIGSEGV"),
        ("exit 0", "is it a Python?"),
    ],
)
def test_a_python_that_breaks_says_how(script: str, why: str, tmp_path: Path) -> None:
    python = program(tmp_path / "python", f"#!/bin/sh\n{script}\n")
    with pytest.raises(Refused) as refused:
        Interpreter(python, 60).ask(QUESTION)
    assert str(refused.value).startswith(f"{python} gave no answer")
    assert str(refused.value).endswith(why)


def test_a_python_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    for path, why in (("plain", "Permission denied"), ("absent", "No such file or directory")):
        with pytest.raises(Refused, match=f"{path} cannot be run: {why}"):
            Interpreter(str(tmp_path / path), 60).ask(QUESTION)


def test_a_python_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = program(tmp_path / "child", "#!/bin/sh\nsleep 600\n")
    python = program(tmp_path / "python", f"#!/bin/sh\n{child} &\nwait\n")
    with pytest.raises(Refused, match=r"no answer within 0\.5 seconds; --reference-timeout"):
        Interpreter(python, 0.5).ask(QUESTION)
    give_up = time.monotonic() + 60
    while str(tmp_path) in commands():
        assert time.monotonic() < give_up, "it still runs"
        time.sleep(0.01)
