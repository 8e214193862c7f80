"""The loader's threads: every outcome comes back as a result, and wakes the engine."""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deltamux.errors import FailedPrecondition
from deltamux.store.digest import content_digest
from deltamux.store.memory.loader import Completed, Loader

# Seconds after which what does not come is a failure.
WAIT = 60.0


@pytest.fixture
def read(files) -> Iterator[Callable[..., Completed]]:
    """Reads one adapter with a parser of the test's own."""
    loaders = []

    def run(parse: Callable[[Path, str], object], digest: str | None = None) -> Completed:
        folder = files.write("a", seed=1)
        loader = Loader(parse, lambda slot, adapter: None)
        loaders.append(loader)
        loader.read(digest or content_digest(folder), str(folder))
        assert select.select([loader.fileno()], [], [], WAIT)[0]
        (completed,) = loader.completed()
        assert loader.completed() == []
        return completed

    yield run
    for loader in loaders:
        loader.close()


def raising(error: BaseException) -> Callable[[Path, str], object]:
    def parse(folder: Path, digest: str) -> object:
        raise error

    return parse


def test_an_error_of_the_parser_comes_back_without_its_frames(read):
    error = read(raising(FailedPrecondition("no", reason="BASE_MISMATCH"))).error
    assert (error.code, error.reason, error.message) == (
        "FAILED_PRECONDITION",
        "BASE_MISMATCH",
        "no",
    )
    assert error.__traceback__ is None


@pytest.mark.parametrize(
    "parse",
    [
        lambda folder, digest: torch.empty(1 << 60, dtype=torch.uint8),
        lambda folder, digest: bytearray(1 << 60),
        raising(torch.OutOfMemoryError()),
    ],
)
def test_lack_of_memory_may_pass(read, parse):
    error = read(parse).error
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    assert error.retry_after is not None


def test_a_thread_that_cannot_start_is_a_lack_of_memory(read, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        error = read(raising(AssertionError("parsed"))).error
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    assert read(lambda folder, digest: "parsed").adapter == "parsed"


def test_a_job_without_a_thread_of_its_own_waits_for_another(files, monkeypatch):
    folder = files.write("a", seed=1)
    digest = content_digest(folder)
    entered, leave = threading.Event(), threading.Event()

    def parse(folder, digest):
        entered.set()
        assert leave.wait(WAIT)
        return "parsed"

    def start(thread):
        raise RuntimeError("can't start new thread")

    loader = Loader(parse, lambda slot, adapter: None)
    loader.read(digest, str(folder))
    assert entered.wait(WAIT)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        loader.read(digest, str(folder))
    leave.set()
    done = []
    while len(done) < 2:
        assert select.select([loader.fileno()], [], [], WAIT)[0]
        done += loader.completed()
    assert [completed.adapter for completed in done] == ["parsed", "parsed"]
    loader.close()


def test_threads_stay_for_the_next_jobs_and_end_with_the_loader(files):
    folder = files.write("a", seed=1)
    digest = content_digest(folder)
    loader = Loader(lambda folder, digest: threading.current_thread(), lambda slot, adapter: None)
    used = set()
    for _ in range(20):
        loader.read(digest, str(folder))
        assert select.select([loader.fileno()], [], [], WAIT)[0]
        used |= {completed.adapter for completed in loader.completed()}
    # Another than the first, should that not be back yet from the job before.
    assert len(used) <= 4
    loader.close()
    for thread in used:
        thread.join(WAIT)
        assert not thread.is_alive()


def test_a_thread_that_waits_keeps_no_adapter(files):
    class Adapter:
        digest = "a"

    loader, adapter = Loader(raising(AssertionError()), lambda slot, adapter: None), Adapter()
    kept = weakref.ref(adapter)
    loader.write(0, adapter)
    del adapter
    assert select.select([loader.fileno()], [], [], WAIT)[0]
    until = time.monotonic() + WAIT
    while kept() is not None and time.monotonic() < until:
        time.sleep(0.001)
    assert kept() is None
    loader.close()


@pytest.mark.parametrize("alone", [False, True])
def test_threads_that_stay_alone_leave_the_others_their_workers(files, alone):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    folder = files.write("a", seed=1)
    loader = Loader(
        lambda folder, digest: torch.get_num_threads(), lambda slot, adapter: None, alone=alone
    )
    loader.read(content_digest(folder), str(folder))
    assert select.select([loader.fileno()], [], [], WAIT)[0]
    assert loader.completed()[0].adapter == (1 if alone else 2)
    assert torch.get_num_threads() == 2
    loader.close()
    torch.set_num_threads(before)


def test_a_bug_tells_nothing_to_clients(read, capsys):
    error = read(raising(ValueError("/secret/path"))).error
    assert (error.code, error.message) == ("INTERNAL", "loading the adapter failed")
    assert "/secret/path" in capsys.readouterr().out


def test_other_content_than_the_digest_says_is_never_parsed(read):
    error = read(raising(AssertionError("parsed")), digest="0" * 64).error
    # The front end makes the copy anew.
    assert (error.code, error.retry_after) == ("DATA_LOSS", 1.0)


def test_files_that_change_while_they_are_parsed_are_data_loss(read):
    def parse(folder: Path, digest: str) -> object:
        os.utime(folder / "adapter_config.json")
        return object()

    assert read(parse).error.code == "DATA_LOSS"


def test_a_fifo_among_the_copies_never_blocks(files):
    folder = files.write("a", seed=1)
    digest = content_digest(folder)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    loader = Loader(raising(AssertionError("parsed")), lambda slot, adapter: None)
    loader.read(digest, str(folder))
    assert select.select([loader.fileno()], [], [], WAIT)[0]
    assert loader.completed()[0].error.code == "DATA_LOSS"
    loader.close()
