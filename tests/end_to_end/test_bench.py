"""`deltamux bench` against a live server: figures of every rate, as JSON and as a picture."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from deltamux.bench.adapters import generating
from deltamux.client import Client
from deltamux.demo.server import Server

REQUESTS, OUTPUT_TOKENS = 6, 4


def test_two_rates_are_measured_written_and_drawn(demo_server: Server, tmp_path: Path):
    bench = subprocess.run(
        [
            *(sys.executable, "-m", "deltamux", "bench", "--target", demo_server.target),
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
    assert [run["request_rate"] for run in runs] == [20.0, "inf"]
    for run in runs:
        assert (run["completed"], run["failed"]) == (REQUESTS, 0)
        assert run["total_output_tokens"] == REQUESTS * OUTPUT_TOKENS
        assert 0 < run["median_ttft_ms"] <= run["p99_ttft_ms"] <= run["p99_e2el_ms"]
        assert run["request_goodput"] == run["request_throughput"]
        assert run["hot"]["completed"] + run["cold"]["completed"] == REQUESTS
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    assert "TTFT" in bench.stdout


def test_without_a_name_those_that_generate_are_asked(demo_server: Server, demo_adapters: Path):
    """A task head is known once it was read; what cannot be read is asked, and fails."""
    copies = {"broken": "leet", "new": "leet", "new-head": "word-count"}
    for copy, name in copies.items():
        shutil.copytree(demo_adapters / name, demo_adapters / copy)
    (demo_adapters / "broken" / "adapter_model.safetensors").write_bytes(b"")
    with Client(demo_server.target, timeout=60) as client:
        while not copies.keys() <= tasks(client).keys():
            time.sleep(0.1)
        asked = generating(client)
        assert copies.keys() & set(asked) == {"broken", "new"}
        assert "leet" in asked and "word-count" not in asked
        told = tasks(client)
        assert [told[name] for name in copies] == ["", "generation", "sequence"]
        assert generating(client) == asked
        for name in copies:
            client.unload_adapter(name)


def tasks(client: Client) -> dict[str, str]:
    return {adapter.name: adapter.task for adapter in client.list_adapters()}
