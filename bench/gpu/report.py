"""The result as JSON, and as a table to read."""

from __future__ import annotations

import datetime
import subprocess
from typing import Any

import torch
import triton


def conditions(peer_versions: dict[str, str]) -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "peers": peer_versions,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True)
    except OSError:  # a container may have the GPU without it
        return "unknown"
    return run.stdout.splitlines()[0] if run.returncode == 0 and run.stdout else "unknown"


def markdown(result: dict[str, Any]) -> str:
    """Milliseconds that the adapters of all layers add to the base alone, an arm a column."""
    where = result["conditions"]
    timed = [row for row in result["steps"] if "adapters_ms" in row]
    arms = list(dict.fromkeys(name for row in timed for name in row["adapters_ms"]))
    head = ["step", "base", "floor, fused", "floor, separate", *arms]
    lines = [
        f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}, torch {where['torch']}, "
        f"triton {where['triton']}, {where['date']}. Peers: their LoRA operations run standalone, "
        f"{', '.join(f'{k} {v}' for k, v in where['peers'].items()) or 'none'}.",
        "",
        "Milliseconds of 32 layers without attention, bfloat16: the base, and what each way adds.",
        "",
        _row(head),
        _row(["---"] * len(head)),
    ]
    for row in timed:
        floors = [row["base_ms"], row["floor_fused_ms"], row["floor_separate_ms"]]
        added = [row["adapters_ms"].get(arm) for arm in arms]
        lines.append(_row([row["step"], *(_milliseconds(value) for value in floors + added)]))
    lines += ["", *_correctness(result["arms"]), "", f"Ops against float64: {result['ops']}."]
    missed = [row["step"] for row in result["steps"] if "not_reached" in row]
    if missed:
        lines += ["", f"Not reached in the time: {'; '.join(missed)}."]
    return "\n".join(lines) + "\n"


def _correctness(rows: list[dict[str, Any]]) -> list[str]:
    head = ["arm", "error, roundings of the sum", "repeats to the bit", "row alone to the bit"]
    head.append("next as apart to the bit")
    lines = [_row(head), _row(["---"] * len(head))]
    for row in rows:
        facts = [row.get(key, "") for key in ("error_ulps", "repeats", "row_alone", "as_apart")]
        if "failed" in row:
            facts[0] = row["failed"]
        lines.append(_row([f"{row['arm']} ({row['site']})", *map(str, facts)]))
    return lines


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
