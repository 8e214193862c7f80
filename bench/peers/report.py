"""Turns runs into figures: medians over rounds, of the cells whose tokens are the reference's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from measure import Runs, peers_for
from peer import Peer
from workload import Cell, Run

Row = dict[str, Any]


def rows(cells: Iterable[Cell], peers: Sequence[Peer], runs: Runs) -> list[Row]:
    """The first peer of a cell is its reference."""
    found = []
    for cell in cells:
        names = [peer.name for peer in peers_for(cell, peers)]
        reference = runs[cell, names[0]]
        found += [_row(cell, name, runs[cell, name], reference) for name in names]
    return found


def _row(cell: Cell, peer: str, runs: list[Run], reference: list[Run]) -> Row:
    """Without figures when an answer differs."""
    pairs = [
        (ours, theirs)
        for run, other in zip(runs, reference, strict=True)
        for ours, theirs in zip(run.tokens, other.tokens, strict=True)
    ]
    equal = sum(ours == theirs for ours, theirs in pairs)
    row = {
        "mode": cell.mode,
        "batch": cell.batch,
        "adapters": len({*cell.adapters} - {None}),
        "peer": peer,
        "answers_equal_to_reference": f"{equal}/{len(pairs)}",
    }
    return row | _figures(cell, runs) if equal == len(pairs) else row


def _figures(cell: Cell, runs: list[Run]) -> Row:
    tokens = cell.batch * cell.new_tokens
    decoded = tokens - cell.batch
    return {
        "tokens_per_second": round(tokens / statistics.median(run.seconds for run in runs), 2),
        "tokens_per_second_all": [round(tokens / run.seconds, 2) for run in runs],
        "decode_tokens_per_second": round(
            decoded / statistics.median(run.seconds - run.prefill_seconds for run in runs), 2
        ),
        "prefill_seconds": round(statistics.median(run.prefill_seconds for run in runs), 3),
    }


def ratios(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """deltamux' tokens per second, client included, over each peer's and over its own base's."""
    rate = {
        (row["mode"], row["batch"], row["peer"]): row["tokens_per_second"]
        for row in rows
        if "tokens_per_second" in row
    }
    found: dict[str, dict[str, float]] = {}
    for (mode, batch, peer), theirs in rate.items():
        ours = rate.get((mode, batch, "deltamux"))
        if ours and peer == "deltamux":
            peer, theirs = "own base", rate.get(("base", batch, "deltamux"), ours)
        if ours:
            found.setdefault(f"{mode} B={batch}", {})[peer] = round(ours / theirs, 3)
    return found


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    lines = [
        "| requests | adapters | peer | tokens/s | decode tokens/s | prefill, s | equal answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [
            row.get(key, "-")
            for key in ("tokens_per_second", "decode_tokens_per_second", "prefill_seconds")
        ]
        cells = [row["batch"], row["mode"], row["peer"], *figures]
        cells.append(row["answers_equal_to_reference"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
