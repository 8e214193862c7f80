"""The real server as a process of its own: how it starts, survives, drains and ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltamux.client import Client, ClientError, generate_request
from deltamux.demo.server import Server
from deltamux.demo.tasks import TASKS, prompt, unseen_inputs, weights_path
from deltamux.launch.private_folder import sweep
from deltamux.v1.inference_pb2 import GenerateRequest, GenerateResponse

# Long enough for a slow machine; no test waits for it when all is well.
PATIENCE = 120.0
TASK = next(task for task in TASKS if task.name == "rot13")


@pytest.fixture
def arguments(endless_base: Path, tmp_path: Path) -> list[str]:
    adapter = weights_path() / "adapters" / TASK.name
    return [
        *("--model", str(endless_base), "--device", "cpu", "--threads", "1"),
        *("--adapter", f"{TASK.name}={adapter}", "--adapter-cache-dir", str(tmp_path / "cache")),
    ]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Temporary files go where the test can see what is left of them."""
    (tmp_path / "tmp").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "tmp")}


def endless(adapter: str = "") -> GenerateRequest:
    request = generate_request("on and on\n", adapter=adapter, max_tokens=60_000)
    request.stopping.ignore_eos = True
    return request


class Running:
    """A request read by a thread of its own."""

    def __init__(self, server: Server, request: GenerateRequest) -> None:
        self._client = Client(server.target, timeout=PATIENCE)
        self._stream = self._client.stream(request)
        self.first: GenerateResponse = next(self._stream)
        self.error: ClientError | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for _ in self._stream:
                pass
        except ClientError as error:
            self.error = error

    def leave(self) -> None:
        self._client.close()
        self._thread.join(PATIENCE)

    def ended(self) -> ClientError | None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._client.close()
        return self.error


def eventually(condition: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        # A process that has ended but was not yet waited for is a zombie.
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def engine_pid(server: Server) -> int:
    return int(server.events("engine ready")[-1]["pid"])


def statuses(channel: grpc.Channel) -> Iterator[int]:
    """What a client that watches the server's health is told."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=PATIENCE
    )
    return (update.status for update in watch)


def ask(client: Client, adapter: str, text: str) -> str:
    return client.generate(generate_request(prompt(text), adapter=adapter)).text


def test_engine_that_dies_is_replaced_and_a_parent_that_dies_takes_it_along(
    arguments, environment, tmp_path
):
    serving, not_serving = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    text = unseen_inputs(TASK, 1)[0]
    with (
        Server(*arguments, environment=environment) as server,
        Client(server.target, timeout=PATIENCE) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        client.pin_adapter(TASK.name)
        assert ask(client, TASK.name, text) == TASK.answer(text)
        running = [Running(server, endless(name)) for name in ("", TASK.name, "")]
        health = statuses(channel)
        assert next(health) == serving

        first_engine = engine_pid(server)
        os.kill(first_engine, signal.SIGKILL)
        killed = time.monotonic()
        for request in running:
            error = request.ended()
            assert (error.code, error.reason) == ("UNAVAILABLE", "ENGINE_LOST")
        assert next(health) == not_serving
        told = time.monotonic()

        assert next(health) == serving
        back = time.monotonic()
        # A busy machine is measured by itself: an engine takes some seconds to start.
        assert told - killed < max(1, (back - told) / 3), "the promise is a second"
        assert eventually(lambda: engine_pid(server) != first_engine)
        second_engine = engine_pid(server)
        assert alive(second_engine)
        adapter = client.list_adapters()[0]
        assert adapter.pinned and adapter.tier == 4, "the pin was not restored"
        assert ask(client, TASK.name, text) == TASK.answer(text)
        assert ask(client, "", text) == text
        restarts = server.metrics()["deltamux_engine_restarts"].samples[0].value
        assert restarts == 1

        (sockets,) = (tmp_path / "tmp").iterdir()
        sweep(sockets.parent)
        assert sockets.exists(), "a server that runs keeps its folder"
        server.process.kill()
        assert eventually(lambda: not alive(second_engine))
    sweep(sockets.parent)
    assert not sockets.exists()


def test_sigterm_lets_running_calls_end(arguments, environment, tmp_path):
    with (
        Server(*arguments, "--drain-grace", "3600", environment=environment) as server,
        Client(server.target, timeout=PATIENCE) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        engine = engine_pid(server)
        health = statuses(channel)
        assert next(health) == health_pb2.HealthCheckResponse.SERVING
        request = generate_request("takes a while\n", max_tokens=300)
        request.stopping.ignore_eos = True
        running = [Running(server, request) for _ in range(2)]
        # As long as it runs, the server does.
        last = Running(server, endless())
        server.process.send_signal(signal.SIGTERM)
        assert next(health) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(ClientError) as refused:
            client.generate(generate_request("too late\n"))
        assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "DRAINING")
        assert [request.ended() for request in running] == [None, None]
        last.leave()
        assert server.process.wait(PATIENCE) == 0
        assert not alive(engine)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_sigterm_ends_what_does_not_fit_into_the_grace(arguments, environment, tmp_path):
    with Server(*arguments, "--drain-grace", "0", environment=environment) as server:
        engine = engine_pid(server)
        running = Running(server, endless(TASK.name))
        server.process.send_signal(signal.SIGTERM)
        error = running.ended()
        assert (error.code, error.reason) == ("UNAVAILABLE", "DRAINING")
        assert server.process.wait(PATIENCE) == 0
        assert not alive(engine)
    written = server.log().splitlines()
    assert written and all(json.loads(line)["event"] for line in written), "other than JSON"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_second_signal_means_now(arguments, environment, tmp_path):
    with Server(*arguments, "--drain-grace", "3600", environment=environment) as server:
        engine = engine_pid(server)
        running = Running(server, endless())
        server.process.send_signal(signal.SIGINT)
        assert eventually(lambda: bool(server.events("draining")))
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 130
        assert running.ended().code == "UNAVAILABLE"
        assert not alive(engine)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_signal_while_starting_ends_it(arguments, environment, tmp_path):
    command = [sys.executable, "-m", "deltamux", "serve", "--port", "0", "--no-metrics"]
    process = subprocess.Popen([*command, *arguments], env=environment)
    # The folder appears when the server's life begins.
    assert eventually(lambda: any((tmp_path / "tmp").iterdir()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert list((tmp_path / "tmp").iterdir()) == []


NEVER_STARTED = """
import sys
import threading
from deltamux.cli import main
from deltamux.launch import engine_process, serve
engine_process.PROGRAM = (sys.executable, "-c", "import threading; threading.Event().wait()")
serve._read_model = lambda model: threading.Event().wait()
sys.exit(main(["serve", "--port", "0", "--no-metrics", *sys.argv[1:]]))
"""


def test_a_start_that_hears_nothing_is_ended_all_the_same(arguments, environment, tmp_path):
    """An engine that imports, a thread that reads a large model: neither looks for a signal."""
    process = subprocess.Popen([sys.executable, "-c", NEVER_STARTED, *arguments], env=environment)
    try:
        assert eventually(lambda: any((tmp_path / "tmp").iterdir()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
    assert list((tmp_path / "tmp").iterdir()) == []
