"""What ends `deltamux serve` before it serves, and the engine process by itself."""

import asyncio
import shutil
import socket
import sys
from functools import partial
from pathlib import Path

import pytest

from deltamux.cli import main
from deltamux.config import EngineConfig
from deltamux.demo.tasks import weights_path
from deltamux.errors import StartupError
from deltamux.frontend.engine_client import EngineClient
from deltamux.launch import engine_process, supervisor
from deltamux.launch.engine_process import EngineProcess
from deltamux.launch.supervisor import Supervisor
from deltamux.metrics import Metrics

MODEL = str(weights_path() / "base")


@pytest.fixture
def fails(capsys):
    def fails(*arguments: str) -> str:
        assert main(["serve", "--port", "0", "--no-metrics", *arguments]) == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line.removeprefix("deltamux serve: ").strip()

    return fails


def test_missing_folders_are_named(fails, tmp_path):
    missing = str(tmp_path / "missing")
    assert fails("--model", missing) == f"--model {missing}: no such folder"
    assert fails("--model", "./missing") == "--model ./missing: no such folder"
    assert fails("--model", str(tmp_path)).startswith(f"--model {tmp_path}: no config.json")
    with_model = ("--model", MODEL)
    assert (
        fails(*with_model, "--adapter-dir", missing) == f"--adapter-dir {missing}: no such folder"
    )
    assert fails(*with_model, "--adapter", f"a={missing}").startswith(f"--adapter a={missing}: ")


def test_adapter_with_pickled_weights_is_refused(fails, tmp_path):
    source = weights_path() / "adapters" / "rot13"
    shutil.copy(source / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "safetensors" in fails("--model", MODEL, "--adapter", f"a={tmp_path}")


@pytest.mark.parametrize("flag", ["--port", "--admin-port", "--metrics-port"])
def test_taken_port_is_named(fails, flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = fails("--model", MODEL, "--metrics", "--metrics-port", "0", flag, port)
    assert line == f"cannot listen on 127.0.0.1:{port}: Address already in use"


def test_one_port_for_two_listeners_is_named(fails):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    line = fails("--model", MODEL, "--port", port, "--admin-port", port)
    assert line == f"cannot listen on 127.0.0.1:{port}: Address already in use"


def test_a_name_that_no_adapter_can_have_is_refused_before_the_model_is_loaded(fails):
    folder = weights_path() / "adapters" / "rot13"
    line = fails("--model", MODEL, "--adapter", f"../x={folder}")
    assert line.startswith(f"--adapter ../x={folder}: an adapter's name is ")


def test_address_of_another_machine_is_named(fails):
    line = fails("--model", MODEL, "--host", "192.0.2.1", "--port", "8000")
    assert line.startswith("cannot listen on 192.0.2.1:8000: ")


async def never() -> None:
    raise AssertionError("the engine was never ready")


def make_supervisor(config: EngineConfig, folder: Path) -> tuple[Supervisor, EngineClient]:
    engine = EngineClient(8, Metrics("m"))
    return Supervisor(config, folder, engine, never, never), engine


async def test_engine_says_why_it_cannot_start(tmp_path):
    """The model is there when the command line looks, and unfit when the engine does."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "model.safetensors").write_bytes(b"not a tensor in sight")
    supervisor, engine = make_supervisor(EngineConfig(str(model)), tmp_path)
    with pytest.raises(StartupError):
        await supervisor.start()
    assert engine.info is None
    with pytest.raises(StartupError):
        await engine.ready()


async def test_a_folder_too_deep_for_a_socket_is_one_line(tmp_path):
    """What TMPDIR names may be longer than the address of a socket."""
    supervisor, _ = make_supervisor(EngineConfig(MODEL), tmp_path / ("d" * 107))
    with pytest.raises(StartupError, match=r"no socket at ipc:.*d/engine-1: File name too long"):
        await supervisor.start()


async def test_engine_that_dies_unheard_is_an_error_too(tmp_path, monkeypatch):
    """No last words: the interpreter itself does not start."""
    monkeypatch.setattr(engine_process, "PROGRAM", ("/bin/false",))
    supervisor, _ = make_supervisor(EngineConfig(MODEL), tmp_path)
    with pytest.raises(StartupError, match="the engine exited with code 1 before it was ready"):
        await supervisor.start()


async def test_a_process_that_cannot_be_had_is_tried_for_again(tmp_path, monkeypatch):
    """As where there is no memory or no descriptor for one, but for a moment."""
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(engine_process, "PROGRAM", ("/bin/false",))
    engine, lost = EngineClient(8, Metrics("m")), partial(asyncio.sleep, 0)
    watched = Supervisor(EngineConfig(MODEL), tmp_path, engine, lost, never)
    with pytest.raises(StartupError):
        await watched.start()
    monkeypatch.setattr(engine_process, "PROGRAM", (str(tmp_path / "nothing"),))
    with pytest.raises(StartupError, match=r"gave up after 5 .*: No such file"):
        await watched.keep_alive()


GARBLED = """
import sys
from deltamux.wire.channel import EngineEnd
from deltamux.wire.messages import Ready
link = EngineEnd(sys.argv[2])
link.send(Ready("m", "cpu", "float32", "torch", 9, 9, 9, 1, ()))
link._socket.send(b"no message")
sys.stdin.read()
"""


async def test_an_engine_that_is_not_understood_is_replaced(tmp_path, monkeypatch):
    """It runs on, and nobody would hear of it again."""
    monkeypatch.setattr(engine_process, "PROGRAM", (sys.executable, "-c", GARBLED))
    lost = asyncio.Event()

    async def on_lost() -> None:
        lost.set()

    config, engine = EngineConfig(MODEL), EngineClient(8, Metrics("m"))
    watched = Supervisor(config, tmp_path, engine, on_lost, never)
    await watched.start()
    watch = asyncio.create_task(watched.keep_alive())
    try:
        await asyncio.wait_for(lost.wait(), 20)
    finally:
        watch.cancel()
        await watched.stop()


async def test_restarting_gives_up_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(supervisor, "LAST_WORDS", 0.001)
    lost = asyncio.Event()
    starts = 0

    async def start(config: EngineConfig, address: str) -> EngineProcess:
        nonlocal starts
        starts += 1
        return EngineProcess(
            await asyncio.create_subprocess_exec("/bin/false", stdin=asyncio.subprocess.PIPE)
        )

    async def on_lost() -> None:
        lost.set()

    monkeypatch.setattr(EngineProcess, "start", start)
    watched = Supervisor(
        EngineConfig(MODEL), tmp_path, EngineClient(8, Metrics("m")), on_lost, never
    )
    with pytest.raises(StartupError):
        await watched.start()
    starts = 0
    with pytest.raises(StartupError, match="gave up after 5 failed starts of the engine: the eng"):
        await watched.keep_alive()
    assert lost.is_set()
    assert starts == supervisor.MAX_FAILED_STARTS
