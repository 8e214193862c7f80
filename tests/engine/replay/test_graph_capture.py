"""In which order streams wait for each other around a capture; torch's CUDA is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from deltamux.engine.replay.cuda_graphs import GraphCapture


class Stream:
    def __init__(self, *_: object) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Cuda:
    """What a capture asks of torch, and the pools of the captures that were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.beside = Stream(), Stream()
        self.pools: list[object] = []
        for name, stand_in in {
            "Stream": lambda device: self.beside,
            "current_stream": lambda device: self.steps,
            "stream": self._nothing,
            "graph": self._graph,
            "graph_pool_handle": object,
            "CUDAGraph": lambda: SimpleNamespace(replay=None),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextmanager
    def _nothing(self, *_: object) -> Iterator[None]:
        yield

    @contextmanager
    def _graph(self, graph: object, pool: object, *_: object, **__: object) -> Iterator[None]:
        self.pools.append(pool)
        yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


class Failing:
    """A step whose run number `failing` does."""

    def __init__(self, failing: int, error: Exception) -> None:
        self._left, self._error = failing, error

    def __call__(self) -> None:
        self._left -= 1
        if not self._left:
            raise self._error


@pytest.mark.parametrize("failing", [1, 2])
def test_the_next_step_waits_for_what_a_failed_capture_has_queued(cuda: Cuda, failing: int) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        GraphCapture(torch.device("cuda"))(Failing(failing, torch.OutOfMemoryError()))
    assert cuda.beside.waited_for == [cuda.steps]
    assert cuda.steps.waited_for == [cuda.beside]


@pytest.mark.parametrize(
    ("error", "pools"), [(torch.OutOfMemoryError(), 1), (RuntimeError("not permitted"), 2)]
)
def test_a_capture_that_was_broken_off_leaves_its_pool_to_nobody(
    cuda: Cuda, error: Exception, pools: int
) -> None:
    capture = GraphCapture(torch.device("cuda"))
    with pytest.raises(type(error)):
        capture(Failing(2, error))
    capture(lambda: None)
    assert len(set(cuda.pools)) == pools
