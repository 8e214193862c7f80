"""The engines, each serving a shape: inside the context, a backend can be connected."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from deltamux.bench.backend import Backend
from deltamux.bench.grpc_backend import GrpcBackend
from deltamux.demo.server import Server
from serving.shape import Shape
from serving.weights import adapter_names

VLLM_START_SECONDS = 420


@contextmanager
def deltamux(folder: Path, shape: Shape, device: str) -> Iterator[Callable[[], Backend]]:
    with (
        tempfile.TemporaryDirectory() as cache,
        Server(
            *("--model", str(folder / "base"), "--adapter-dir", str(folder / "adapters")),
            *("--device", device, "--adapter-cache-dir", cache),
            *("--max-model-len", str(shape.max_model_len)),
            *("--max-num-seqs", str(shape.max_num_seqs), "--max-num-batched-tokens", "2048"),
            *("--max-adapter-slots", str(shape.slots), "--adapter-host-bytes", "32GiB"),
        ) as server,
    ):
        yield lambda: GrpcBackend(server.target)


@contextmanager
def vllm(python: Path, folder: Path, shape: Shape, device: str) -> Iterator[Callable[[], Backend]]:
    """Its OpenAI server; the adapters are loaded before it is ready."""
    from deltamux.bench.openai_backend import OpenAIBackend

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += vllm_arguments(folder, shape, port)
    process = subprocess.Popen(
        [str(word) for word in command], env={**os.environ, **vllm_environment(device)}
    )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health")
        yield lambda: OpenAIBackend(f"127.0.0.1:{port}", shape.config.vocab_size)
    finally:
        process.terminate()
        process.wait()


def vllm_arguments(folder: Path, shape: Shape, port: int) -> list[object]:
    names = adapter_names(shape.adapters[-1])
    return [
        *("--model", folder / "base", "--served-model-name", "base", "--dtype", shape.dtype),
        *("--host", "127.0.0.1", "--port", port, "--max-model-len", shape.max_model_len),
        *("--max-num-seqs", shape.max_num_seqs, "--max-num-batched-tokens", 2048),
        *("--enable-lora", "--max-loras", shape.slots, "--max-lora-rank", max(shape.ranks)),
        *("--max-cpu-loras", len(names), "--disable-uvicorn-access-log", "--lora-modules"),
        *(f"{name}={folder / 'adapters' / name}" for name in names),
    ]


def vllm_environment(device: str) -> dict[str, str]:
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    on_cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return quiet | (on_cpu if device == "cpu" else {})


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + VLLM_START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError("vLLM ended")
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise RuntimeError(f"vLLM was not ready after {VLLM_START_SECONDS} s")
