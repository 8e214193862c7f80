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


def test_no_capture_is_tried_where_none_can_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "can_be_captured", lambda base: False)
    base: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    nothing: Any = None
    with capture_logs() as logs:
        chore = build._replay_steps(nothing, EngineConfig(""), base, nothing, 1)
    assert chore is no_chore
    assert [log["log_level"] for log in logs] == ["warning"]
