"""deltamux as a peer: a real `deltamux serve`, and gRPC on the same machine."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from workload import Cell, Run, adapter_name

from deltamux.client import AsyncClient, generate_request
from deltamux.demo.server import Server


class DeltamuxServer:
    name = "deltamux"
    version = metadata.version("deltamux")
    caches_prefixes = True

    def __init__(
        self, folder: Path, adapters: Iterable[int], threads: int, *, cache_prefixes: bool
    ) -> None:
        self._cache = tempfile.TemporaryDirectory()
        arguments = ["--model", str(folder / "base"), "--threads", str(threads)]
        arguments += ["--adapter-cache-dir", self._cache.name]
        if not cache_prefixes:
            arguments.append("--no-enable-prefix-caching")
        for name in map(adapter_name, adapters):
            arguments += ["--adapter", f"{name}={folder / 'adapters' / name}"]
        self._server = Server(*arguments)
        self._server.__enter__()

    def serve(self, cell: Cell) -> Run:
        return asyncio.run(self._serve(cell))

    async def _serve(self, cell: Cell) -> Run:
        pairs = zip(cell.prompts, cell.adapters, strict=True)
        async with AsyncClient(self._server.target) as client:
            start = time.perf_counter()
            answers = await asyncio.gather(
                *(_answer(client, prompt, index, cell.new_tokens) for prompt, index in pairs)
            )
            end = time.perf_counter()
        return Run(
            seconds=end - start,
            prefill_seconds=max(first for first, _ in answers) - start,
            tokens=[tokens for _, tokens in answers],
        )

    def close(self) -> None:
        self._server.stop()
        self._cache.cleanup()


async def _answer(
    client: AsyncClient, prompt: list[int], index: int | None, new_tokens: int
) -> tuple[float, list[int]]:
    """When the first token came, and all of them."""
    request = generate_request(
        prompt,
        adapter="" if index is None else adapter_name(index),
        max_tokens=new_tokens,
        temperature=0.0,
        ignore_eos=True,
    )
    tokens: list[int] = []
    first = 0.0
    async for response in client.stream(request):
        tokens += response.token_ids
        first = first or (time.perf_counter() if tokens else 0.0)
    return first, tokens
