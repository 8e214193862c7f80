"""What the host leaves to a process, against its real limits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deltamux.engine import host_memory
from deltamux.engine.host_memory import free_host_bytes

_UNDER_A_LIMIT = """
import resource
from deltamux.engine.host_memory import free_host_bytes
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
free = free_host_bytes()
taken = bytearray(100 << 20)
print(free, free - free_host_bytes())
try:
    bytearray(free_host_bytes() + (1 << 20))
except MemoryError:
    print("refused")
"""


def test_a_limit_of_the_process_counts_what_it_has_taken():
    run = subprocess.run(
        [sys.executable, "-c", _UNDER_A_LIMIT], capture_output=True, text=True, check=True
    )
    free, taken, last = run.stdout.split()
    assert 0 < int(free) < 1 << 30
    assert 100 << 20 <= int(taken) < 110 << 20
    assert last == "refused"


def test_a_container_counts_what_it_has_taken_but_for_cached_files(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 700\n")
    assert free_host_bytes() == 5000 - 3000 + 700


@pytest.mark.parametrize("content", ["max\n", None])
def test_without_a_limit_the_machine_is_the_limit(tmp_path, monkeypatch, content):
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    if content is not None:
        (tmp_path / "memory.max").write_text(content)
    assert free_host_bytes() > 1 << 20


def test_where_there_is_no_proc_all_of_the_machine_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    left = free_host_bytes()
    monkeypatch.setattr(host_memory, "_PROC", tmp_path)
    assert free_host_bytes() >= left > 1 << 20
