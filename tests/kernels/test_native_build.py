"""The compiled C code is kept for the next start, and made anew where it would not fit."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deltamux_kernels import native
from deltamux_kernels.native import build, library

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C compiler")


class Compiler:
    """Counts what is really compiled."""

    def __init__(self) -> None:
        self.times = 0
        self._compile = build._compile

    def __call__(self, *given: Any) -> Path:
        self.times += 1
        return self._compile(*given)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(build, "_compile", counting := Compiler())
    return counting


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "deltamux" / "native"


def test_the_second_start_finds_the_library_of_the_first(compiler: Compiler, cache: Path) -> None:
    for _ in range(2):
        assert build.load_library().shrink
    assert compiler.times == 1
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_a_broken_library_is_made_anew(compiler: Compiler, cache: Path) -> None:
    kept = cache / f"{build._key(['cc'])}.so"
    cache.mkdir(parents=True)
    kept.write_bytes(b"no library")
    for _ in range(2):
        assert build.load_library().shrink
    assert compiler.times == 1 and [*cache.iterdir()] == [kept]


def test_other_code_or_another_compiler_is_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [build._key(["cc"]), build._key(["cc", "-DA=1"]), build._key(["cc", "-g"])]
    changed = tmp_path / "spans.h"
    changed.write_text("/* another */")
    monkeypatch.setattr(build, "_FILES", [*build._FILES, changed])
    assert len({*keys, build._key(["cc"])}) == 4


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(
    compiler: Compiler, cache: Path
) -> None:
    cache.parent.parent.joinpath("deltamux").write_text("a file")
    for _ in range(2):
        assert build.load_library().shrink
    assert compiler.times == 2


def test_a_user_without_a_home_keeps_nothing(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert build.load_library().shrink
    assert compiler.times == 1 and not list(tmp_path.iterdir())
    # Nor is what lies in the working directory theirs.
    planted = tmp_path / "~/.cache/deltamux/native" / f"{build._key(['cc'])}.so"
    planted.parent.mkdir(parents=True)
    build._compile(["cc"], planted.parent).rename(planted)
    assert build.load_library().shrink
    assert compiler.times == 3


@pytest.mark.parametrize("forbidden", ["kept", "made"])
def test_a_folder_of_which_nothing_may_be_run_is_not_needed(
    forbidden: str, compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = build._loaded

    def load(library: Path) -> ctypes.CDLL:
        if library.is_relative_to(cache) == (forbidden == "kept"):
            raise OSError("failed to map segment from shared object")
        return loaded(library)

    monkeypatch.setattr(build, "_loaded", load)
    assert build.load_library().shrink


def test_without_a_compiler_it_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(OSError, match="no-such-compiler"):
        build.load_library()
    monkeypatch.setenv("CC", "false")
    with pytest.raises(subprocess.SubprocessError):
        build.load_library()
    monkeypatch.setenv("CC", "cc '")
    assert library._compiled.__wrapped__() is None
