"""The loader's threads: every outcome comes back as a result, and wakes the engine."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deltamux.errors import FailedPrecondition
from deltamux.store.content import content_digest
from deltamux.store.loader import Completed, Loader


@pytest.fixture
def read(files) -> Iterator[Callable[..., Completed]]:
    """Reads one adapter with a parser of the test's own."""
    loaders = []

    def run(parse: Callable[[Path, str], object], digest: str | None = None) -> Completed:
        folder = files.write("a", seed=1)
        loader = Loader(parse, lambda slot, adapter: None)
        loaders.append(loader)
        loader.read(digest or content_digest(folder), str(folder))
        assert select.select([loader.fileno()], [], [], 10)[0]
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


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError()])
def test_lack_of_memory_may_pass(read, error):
    error = read(raising(error)).error
    assert (error.code, error.retry_after is None) == ("RESOURCE_EXHAUSTED", False)


def test_a_bug_tells_nothing_to_clients(read, capsys):
    error = read(raising(ValueError("/secret/path"))).error
    assert (error.code, error.message) == ("INTERNAL", "loading the adapter failed")
    assert "/secret/path" in capsys.readouterr().out


def test_other_content_than_the_digest_says_is_never_parsed(read):
    error = read(raising(AssertionError("parsed")), digest="0" * 64).error
    assert error.code == "DATA_LOSS"


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
    assert select.select([loader.fileno()], [], [], 10)[0]
    assert loader.completed()[0].error.code == "DATA_LOSS"
    loader.close()
