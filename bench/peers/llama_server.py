"""llama.cpp as a peer: its server, and HTTP on the same machine; adapters by each request's `lora`.

The settings are those under which its tokens are float32's: keys and values in float32, no flash
attention.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from workload import ADAPTERS, Cell, Run, adapter_name

START_SECONDS = 120
# One slot a request, each with room for 256 tokens.
SLOTS, SLOT_TOKENS = 16, 256


class LlamaServer:
    name = "llama.cpp"
    caches_prefixes = True

    def __init__(self, program: Path, folder: Path, threads: int, *, cache_prefixes: bool) -> None:
        """`folder` holds gguf/, which to_gguf.py makes."""
        self._cache_prefixes = cache_prefixes
        self.version = _version(program)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [str(word) for word in (program, *_arguments(folder / "gguf", threads, port))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_until_ready()

    def serve(self, cell: Cell) -> Run:
        """Times the prefill apart, by other prompts.

        Requests of different adapters are answered in turn, so that a first token may wait for the
        last one of others.
        """
        return asyncio.run(self._serve(cell))

    async def _serve(self, cell: Cell) -> Run:
        async with httpx2.AsyncClient(base_url=self._url, timeout=None) as client:
            prefill, _ = await self._wave(
                client, replace(cell, seed=1000 + cell.seed, new_tokens=1)
            )
            seconds, tokens = await self._wave(client, cell)
        return Run(seconds, prefill, tokens)

    async def _wave(self, client: httpx2.AsyncClient, cell: Cell) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        responses = await asyncio.gather(
            *(
                client.post("/completion", json=request)
                for request in requests(cell, self._cache_prefixes)
            )
        )
        seconds = time.perf_counter() - start
        return seconds, [response.raise_for_status().json()["tokens"] for response in responses]

    def _wait_until_ready(self) -> None:
        """/health answers 503 while the model is read."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended")
            try:
                if httpx2.get(f"{self._url}/health").is_success:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.2)
        self.close()
        raise RuntimeError(f"{self.name} was not ready after {START_SECONDS} s")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def requests(cell: Cell, cache_prefixes: bool) -> list[dict[str, Any]]:
    """`lora` is never left out: without it a request gets all adapters at once.

    A slot remembers one prompt, of one adapter; so request i goes to slot i each time.
    """
    return [
        {
            "prompt": prompt,
            "n_predict": cell.new_tokens,
            "temperature": 0.0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": cache_prefixes,
            "id_slot": slot,
            "return_tokens": True,
            "lora": [{"id": index or 0, "scale": 0.0 if index is None else 1.0}],
        }
        for slot, (prompt, index) in enumerate(zip(cell.prompts, cell.adapters, strict=True))
    ]


def _arguments(gguf: Path, threads: int, port: int) -> list[object]:
    adapters = ",".join(str(gguf / f"{adapter_name(i)}.gguf") for i in range(ADAPTERS))
    return [
        *("--model", gguf / "base.gguf", "--lora", adapters, "--lora-init-without-apply"),
        *("--host", "127.0.0.1", "--port", port, "--threads", threads, "--threads-batch", threads),
        *("--parallel", SLOTS, "--ctx-size", SLOTS * SLOT_TOKENS),
        *("--batch-size", 2048, "--ubatch-size", 512),
        *("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"),
        # Prompts that fell out of their slots; it does not know whose adapter they were of.
        *("--cache-ram", 0),
    ]


def _version(program: Path) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return (said.stderr or said.stdout).splitlines()[0].removeprefix("version: ")
