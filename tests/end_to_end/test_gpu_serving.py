"""bench/gpu_serving.py with its tiny shape: weights, server, load and figures, as on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

from serving.shape import TINY

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_serving.py"


def test_every_number_of_adapters_is_asked_at_every_rate(tmp_path: Path) -> None:
    figures = tmp_path / "serving.json"
    run = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--dry-run", "--folder", str(tmp_path)),
            *("--json", str(figures)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    runs = json.loads(figures.read_text())["runs"]
    assert [(run["num_adapters"], run["request_rate"]) for run in runs] == [
        (count, rate) for count in TINY.adapters for rate in TINY.rates
    ]
    assert all(run["completed"] == run["num_prompts"] for run in runs)
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {
        f"a{index:04d}" for index in range(TINY.adapters[-1])
    }
