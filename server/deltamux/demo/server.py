"""A `deltamux serve` of one's own: a child process on free ports, gone when its owner is."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Self
from urllib.request import urlopen

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

# Lines of the server's log that are kept, to be shown when it fails.
KEPT_LINES = 200
# Seconds after which a server that was asked to stop is killed.
STOP_SECONDS = 40.0


class ServerFailed(Exception):
    """The server ended before it was ready; the message is what it said."""


class Server:
    """Context manager: inside it, the server is ready at `target`.

    `arguments` are those of `deltamux serve`, without ports. The server says in its log where
    it listens, so that no port is guessed.
    """

    program: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "deltamux")

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._arguments = arguments
        self._environment = environment
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._listening: dict[str, Any] = {}
        self._ready_or_ended = threading.Event()

    def __enter__(self) -> Self:
        command = [*self.program, "serve", "--log-format", "json"]
        command += ["--port", "0", "--metrics-port", "0", *self._arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=self._environment
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            self._ready_or_ended.wait()
        except KeyboardInterrupt:
            self.stop()
            raise
        if not self._listening:
            self.stop()
            raise ServerFailed(self.log())
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self._listening['port']}"

    def log(self) -> str:
        """The last lines that the server wrote."""
        return "".join(self._lines)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's events of this name, oldest first."""
        lines = [line for line in list(self._lines) if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def metrics(self) -> dict[str, Metric]:
        """The series of its /metrics, by name."""
        url = f"http://127.0.0.1:{self._listening['metrics_port']}/metrics"
        with urlopen(url, timeout=10) as page:
            text = page.read().decode()
        return {family.name: family for family in text_string_to_metric_families(text)}

    def stop(self) -> int:
        """Asks it to drain, waits for its end, returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join()
        return code

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._lines.append(line)
                if '"event": "serving"' in line:
                    self._listening = json.loads(line)
                    self._ready_or_ended.set()
        self._ready_or_ended.set()
