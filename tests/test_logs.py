import json
import logging
import sys
from collections.abc import Iterator

import pytest
import structlog

from deltamux import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_carry_what_the_task_has_bound(capsys):
    logs.configure("json")
    structlog.contextvars.bind_contextvars(request_id="r1", adapter="a")
    structlog.get_logger("deltamux.frontend").info("call", code="OK")
    (line,) = lines(capsys)
    assert line["event"] == "call"
    assert (line["request_id"], line["adapter"], line["code"]) == ("r1", "a", "OK")
    assert (line["level"], line["logger"]) == ("info", "deltamux.frontend")
    assert str(line["timestamp"]).endswith("Z")


def test_other_libraries_logs_are_in_the_same_form(capsys):
    logs.configure("json", "warning")
    logging.getLogger("library").info("below the level")
    logging.getLogger("library").warning("half of %s", "it")
    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["logger"]) == ("half of it", "warning", "library")


def test_a_traceback_stays_on_its_line(capsys):
    logs.configure("json")
    try:
        raise ValueError("why")
    except ValueError:
        structlog.get_logger("deltamux").exception("failed")
    (line,) = lines(capsys)
    assert "ValueError: why" in str(line["exception"])


def test_auto_is_json_unless_a_person_reads(capsys, monkeypatch):
    logs.configure("auto")
    structlog.get_logger("deltamux").info("said")
    assert lines(capsys)[0]["event"] == "said"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logs.configure("auto")
    structlog.get_logger("deltamux").info("shown", answer=42)
    shown = capsys.readouterr().err
    assert "shown" in shown and not shown.startswith("{")


def test_console_can_be_asked_for(capsys):
    logs.configure("console")
    structlog.get_logger("deltamux").info("shown", answer=42)
    assert "answer=42" in capsys.readouterr().err


def test_a_console_traceback_shows_no_variables(capsys):
    logs.configure("console")
    prompt = "what a client asked"
    try:
        raise ValueError(len(prompt))
    except ValueError:
        structlog.get_logger("deltamux").exception("failed")
    shown = capsys.readouterr().err
    assert "ValueError: 19" in shown
    assert prompt not in shown
