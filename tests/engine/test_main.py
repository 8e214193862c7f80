import gc

import pytest
from structlog.testing import capture_logs

from deltamux.config import EngineConfig
from deltamux.engine import __main__ as process
from deltamux.errors import StartupError
from deltamux.wire.messages import Ready, StartupFailed

READY = Ready("m", "cpu", "float32", "torch", 8, 8, 8, 2, ("lora",))


class Engine:
    def __init__(self, error=None):
        self.error = error

    def run(self):
        self.looked_through = len(gc.get_objects())
        if self.error is not None:
            raise self.error


@pytest.fixture
def serve(monkeypatch, fake_link):
    """Runs a process whose engine is built by `build`; returns its exit code and its words."""

    def run(build):
        monkeypatch.setattr(process, "build_engine", build)
        link = fake_link()
        with capture_logs() as logs:
            code = process._serve(EngineConfig("m"), link)
        gc.unfreeze()
        return code, link.sent, [entry["event"] for entry in logs]

    return run


def test_ready_then_the_loop_until_shutdown(serve):
    assert serve(lambda config, link: (Engine(), READY)) == (0, [READY], [])


def test_a_known_obstacle_is_told_in_its_own_words(serve):
    def build(config, link):
        raise StartupError("no such model")

    assert serve(build) == (1, [StartupFailed("no such model")], [])


def test_an_unknown_obstacle_is_told_in_one_line_and_logged(serve):
    def build(config, link):
        raise ValueError("first line\nsecond line")

    message = "the engine cannot start: first line"
    assert serve(build) == (1, [StartupFailed(message)], ["the engine cannot start"])


def test_an_error_of_the_loop_ends_the_process(serve):
    engine = Engine(RuntimeError("device lost"))
    code, sent, logs = serve(lambda config, link: (engine, READY))
    assert (code, sent, logs) == (1, [READY], ["the engine has failed"])


def test_garbage_is_not_looked_for_in_what_the_start_has_left(serve):
    engine, left = Engine(), [[number] for number in range(10_000)]
    serve(lambda config, link: (engine, READY))
    assert engine.looked_through < len(left)
