"""`deltamux bench` against a live server: figures of every rate, as JSON and as a picture."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from deltamux.bench.adapters import generating
from deltamux.client import Client
from deltamux.demo.server import Server
from deltamux.demo.tasks import weights_path

REQUESTS, OUTPUT_TOKENS = 6, 4
ADAPTERS = ("caesar", "leet", "rot13", "upper-case")
WEIGHTS = weights_path()


def serving(*arguments: str) -> Server:
    return Server("--model", str(WEIGHTS / "base"), "--device=cpu", "--threads=1", *arguments)


def test_two_rates_are_measured_written_and_drawn(tmp_path: Path):
    with serving(
        *(f"--adapter={name}={WEIGHTS / 'adapters' / name}" for name in ADAPTERS),
        f"--adapter-cache-dir={tmp_path / 'cache'}",
    ) as server:
        bench = subprocess.run(
            [
                *(sys.executable, "-m", "deltamux", "bench", "--target", server.target),
                *("--request-rate", "20", "--request-rate", "inf", "--warmup", "2"),
                *("--num-prompts", str(REQUESTS), "--input-len", "4:8"),
                *("--output-len", str(OUTPUT_TOKENS), "--popularity", "zipf:1.0"),
                *("--goodput", "ttft:60000", "--save-json", str(tmp_path / "figures.json")),
                *("--save-png", str(tmp_path / "figures.png")),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert bench.returncode == 0, bench.stderr
    runs = json.loads((tmp_path / "figures.json").read_text())
    assert [run["request_rate"] for run in runs] == [20.0, float("inf")]
    for run in runs:
        assert (run["completed"], run["failed"]) == (REQUESTS, 0)
        assert run["total_output_tokens"] == REQUESTS * OUTPUT_TOKENS
        assert 0 < run["median_ttft_ms"] <= run["p99_ttft_ms"] <= run["p99_e2el_ms"]
        assert run["request_goodput"] == run["request_throughput"]
        assert run["hot"]["completed"] + run["cold"]["completed"] == REQUESTS
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    assert "TTFT" in bench.stdout


def test_without_a_name_those_that_generate_are_asked(tmp_path: Path):
    """A task head is known once it was read; what cannot be read is asked, and fails."""
    shutil.copytree(WEIGHTS / "adapters" / "leet", tmp_path / "broken")
    with (
        serving(
            *(f"--adapter={name}={WEIGHTS / 'adapters' / name}" for name in ("leet", "word-count")),
            f"--adapter=broken={tmp_path / 'broken'}",
            f"--adapter-cache-dir={tmp_path / 'cache'}",
        ) as server,
        Client(server.target) as client,
    ):
        (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"")
        assert generating(client) == ("broken", "leet")
        told = {adapter.name: adapter.task for adapter in client.list_adapters()}
        assert told == {"broken": "", "leet": "generation", "word-count": "sequence"}
        assert generating(client) == ("broken", "leet")
