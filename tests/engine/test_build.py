"""What of an engine depends on the device; tests/end_to_end runs whole ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from deltamux.config import EngineConfig
from deltamux.engine import build
from deltamux.engine.engine import no_chore

GPU: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
NOTHING: Any = None


class Runner:
    logits = None

    def __init__(self) -> None:
        self.used: list[Any] = []

    def use(self, replays: Any) -> None:
        self.used.append(replays)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the build makes in place of CUDA graphs."""
    graphs = SimpleNamespace(capture_base=lambda: True, next_capture=lambda: None)
    monkeypatch.setattr(build, "StepGraphs", lambda *_: graphs)
    for name in ("GraphCapture", "step_buffers"):
        monkeypatch.setattr(build, name, lambda *_: None)
    monkeypatch.setattr(build, "can_be_captured", lambda base: True)
    return graphs


def replay_steps(runner: Any) -> Any:
    return build._replay_steps(runner, EngineConfig(""), GPU, NOTHING, 1)


@pytest.mark.parametrize("agree", [False, True])
def test_graphs_are_used_that_give_what_steps_do(
    graphs: Any, agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "replays_agree", lambda *_: agree)
    runner = Runner()
    assert replay_steps(runner) is (graphs.next_capture if agree else no_chore)
    assert runner.used == [graphs] * agree


def test_without_memory_to_try_graphs_the_engine_does_without(
    graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(*_: Any) -> bool:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(build, "replays_agree", agree)
    runner = Runner()
    with capture_logs() as logs:
        assert replay_steps(runner) is no_chore
    assert not runner.used
    assert [log["log_level"] for log in logs] == ["warning"]


def test_no_capture_is_tried_where_none_can_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "can_be_captured", lambda base: False)
    with capture_logs() as logs:
        assert replay_steps(NOTHING) is no_chore
    assert [log["log_level"] for log in logs] == ["warning"]
