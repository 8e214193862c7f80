"""Folders of servers that were really killed are swept away, and no others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltamux.errors import StartupError
from deltamux.launch.private_folder import PrivateFolder, sweep

HOLD = """
import socket, sys
from deltamux.launch.private_folder import PrivateFolder
folder = PrivateFolder()
socket.socket(socket.AF_UNIX).bind(f"{folder.path}/engine-1")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /tmp, here and in new processes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.fixture
def hold(root: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], Path]]]:
    """Starts a process that has a folder, with a socket in it, until it is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_next_start_removes_what_a_killed_server_left(hold, root) -> None:
    (killed, left), (_, running) = hold(), hold()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list(left.iterdir()) == [left / "engine-1"]
    own = PrivateFolder()
    assert {*root.iterdir()} == {running, own.path}
    assert (running / "engine-1").is_socket()
    own.remove()
    assert [*root.iterdir()] == [running]


def test_only_this_user_can_open_it(root) -> None:
    folder = PrivateFolder()
    assert folder.path.parent == root and folder.path.stat().st_mode & 0o777 == 0o700
    folder.remove()


def test_what_is_not_ours_to_remove_stays(root, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{elsewhere}/engine-1")
    (root / "deltamux-sockets-link").symlink_to(elsewhere)
    (root / "deltamux-sockets-file").write_text("notes")
    notes = root / "deltamux-sockets-notes"
    notes.mkdir()
    (notes / "notes").write_text("mine")
    other = root / "sockets"
    other.mkdir()
    before = {*root.iterdir()}
    sweep(root)
    assert {*root.iterdir()} == before
    assert (notes / "notes").exists() and (elsewhere / "engine-1").is_socket()


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")
def test_folders_of_other_users_stay(root) -> None:
    folder = root / "deltamux-sockets-other"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    sweep(root)
    assert folder.exists()


def test_where_nothing_can_be_written_the_server_cannot_start(root, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(root / "missing"))
    with pytest.raises(StartupError, match=r"no folder for sockets: .*/missing/"):
        PrivateFolder()


def test_nothing_to_sweep(tmp_path) -> None:
    sweep(tmp_path / "missing")
