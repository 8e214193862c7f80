"""A cold adapter on a disk that does not answer, beside streams that run."""

from __future__ import annotations

import threading

import pytest

from deltamux.engine import build


class Disk:
    """Stops every reading of one adapter until the test lets it go on."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.asked, self.answers = threading.Event(), threading.Event()
        self._parse = build.parse_adapter

    def parse(self, folder, digest, structure, dtype):
        if digest == self.digest:
            self.asked.set()
            assert self.answers.wait(60)
        return self._parse(folder, digest, structure, dtype)


@pytest.fixture
def disk(world, monkeypatch) -> Disk:
    disk = Disk(world.adapters["large"].digest)
    monkeypatch.setattr(build, "parse_adapter", disk.parse)
    return disk


@pytest.fixture
def engine_here(disk, engine_config, engine_in_thread):
    with engine_in_thread(engine_config) as driver:
        yield driver
        disk.answers.set()


def test_no_stream_waits_for_the_disk(engine_here, disk, world, submit):
    """However long the disk takes: the streams go from beginning to end while it says nothing."""
    prompt = tuple(range(20))
    engine_here.send(submit("running", prompt, "plain", max_tokens=40))
    engine_here.until(lambda: engine_here.answers["running"].tokens)
    engine_here.send(submit("cold", prompt, "large"))
    engine_here.until(disk.asked.is_set)

    during = [
        submit("warm", prompt, "plain"),
        submit("base", prompt),
        submit("new", prompt, "small"),
    ]
    answers = engine_here.run(*during)
    engine_here.until(lambda: engine_here.answers["running"].finish)
    assert not disk.answers.is_set() and not engine_here.answers["cold"].tokens
    running = engine_here.answers["running"].tokens[0]
    assert running == world.greedy(prompt, 40, "plain")
    for adapter, answer in zip(("plain", "", "small"), answers, strict=True):
        assert answer.tokens[0] == world.greedy(prompt, 8, adapter)

    disk.answers.set()
    engine_here.until(lambda: engine_here.answers["cold"].finish)
    assert engine_here.answers["cold"].tokens[0] == world.greedy(prompt, 8, "large")
    assert engine_here.answers["cold"].first[0].adapter_load > 0
