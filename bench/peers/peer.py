"""What a peer is, and those that are a worker process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from workload import Cell, Run


class Peer(Protocol):
    name: str
    version: str
    # Remembers what prompts begin with, when it was told to.
    caches_prefixes: bool

    def serve(self, cell: Cell) -> Run: ...

    def close(self) -> None: ...


class Worker:
    """A peer in a process of its own, which says its version and then answers a line a cell."""

    def __init__(
        self,
        name: str,
        command: Iterable[object],
        environment: Mapping[str, str],
        *,
        caches_prefixes: bool = False,
    ) -> None:
        """`command` is the interpreter, the script beside this file and its arguments."""
        python, script, *arguments = map(str, command)
        self.name = name
        self.caches_prefixes = caches_prefixes
        self._process = subprocess.Popen(
            [python, str(Path(__file__).parent / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.version: str = json.loads(self._line())["version"]

    def serve(self, cell: Cell) -> Run:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(cell)) + "\n")
        self._process.stdin.flush()
        return Run(**json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended")
        return line

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
