"""The engine's end of a real socket: what it makes of bytes that are no message."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import zmq
from structlog.testing import capture_logs

from deltamux.wire.channel import EngineEnd
from deltamux.wire.messages import AdapterFailed, Cancel, Outbound, RequestFailed, ToEngine

encode = msgspec.msgpack.encode


@dataclass
class Link:
    """An engine's end and a raw socket in the front end's place."""

    engine: EngineEnd
    socket: zmq.Socket[bytes]

    def receive(self, *sent: bytes) -> list[ToEngine]:
        """All that the engine gets of it; the last one of it must be a message."""
        for message in sent:
            self.socket.send(message)
        got: list[ToEngine] = []
        while not got or encode(got[-1]) != sent[-1]:
            self.engine.wait(10)
            got += self.engine.receive()
        return got

    def answers(self) -> list[object]:
        self.engine.send(RequestFailed("end", "", "", ""))
        decode = msgspec.msgpack.Decoder(Outbound).decode
        answers = list(iter(lambda: decode(self.socket.recv()), RequestFailed("end", "", "", "")))
        return answers


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.bind(f"ipc://{tmp_path}/socket")
    engine = EngineEnd(f"ipc://{tmp_path}/socket")
    yield Link(engine, socket)
    engine.close()
    socket.close()
    context.term()


def test_a_deadline_may_lie_years_ahead(link: Link) -> None:
    link.socket.send(encode(LAST))
    assert link.engine.wait(1e9)
    assert link.engine.receive() == [LAST]


def test_a_wait_says_whether_anything_came(link: Link) -> None:
    assert not link.engine.wait(0.0)
    link.socket.send(encode(LAST))
    assert link.engine.wait(10)
    assert link.engine.wait(0.0), "as long as it is not received"


LAST = Cancel("last")
NO_MESSAGES = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "cut short": encode(LAST)[:-2],
    "trailing bytes": encode(LAST) + b"\x00",
    "a number": encode(7),
    "an unknown kind": encode({"type": "Reboot"}),
    "a field of another type": encode({"type": "Cancel", "request_id": 7}),
    "no UTF-8": b"\x81\xa4type\xa2\xff\xff",
    "nested without end": b"\x91" * 100_000,
    "nested in a field": b"\x81\xa4type" + b"\x91" * 100_000,
    "a pickle": b"\x80\x04.",
}


@pytest.mark.parametrize("received", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_is_logged_and_dropped(link: Link, received: bytes) -> None:
    first = Cancel("first")
    with capture_logs() as logs:
        assert link.receive(encode(first), received, encode(LAST)) == [first, LAST]
    assert [entry["log_level"] for entry in logs] == ["error"]
    assert logs[0]["bytes"] == len(received)
    assert link.answers() == []


def test_random_bytes_never_raise(link: Link) -> None:
    numbers = random.Random(0)
    noise = [numbers.randbytes(numbers.randrange(40)) for _ in range(500)]
    spoilt = [bytearray(encode(Cancel("x" * 20, (1, 2)))) for _ in range(500)]
    for message in spoilt:
        message[numbers.randrange(len(message))] = numbers.randrange(256)
    with capture_logs():
        assert link.receive(*noise, *map(bytes, spoilt), encode(LAST))[-1] == LAST


@pytest.mark.parametrize(
    ("order", "failed", "name"),
    [
        ({"type": "Submit", "request_id": "r", "prompt": "text"}, RequestFailed, "r"),
        ({"type": "Submit", "request_id": "r"}, RequestFailed, "r"),
        ({"type": "LoadAdapter", "digest": "d", "path": 3}, AdapterFailed, "d"),
    ],
)
def test_whom_it_would_have_served_is_told(
    link: Link, order: dict[str, object], failed: Callable[..., object], name: str
) -> None:
    with capture_logs():
        assert link.receive(encode(order), encode(LAST)) == [LAST]
    words = ("INTERNAL", "NOT_UNDERSTOOD", "the engine did not understand the order")
    assert link.answers() == [failed(name, *words)]
