"""Peers take turns: each round serves every cell by every peer that is wanted in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from peer import Peer
from workload import Cell, Run

PLAIN, PEFT = "transformers", "transformers + PEFT"
# One run a round, by cell and peer's name.
Runs = dict[tuple[Cell, str], list[Run]]


def peers_for(cell: Cell, peers: Iterable[Peer]) -> list[Peer]:
    """Plain transformers serves the base alone; PEFT is wanted where there are adapters."""
    absent = PEFT if cell.mode == "base" else PLAIN
    return [peer for peer in peers if peer.name != absent]


def measure(cells: Sequence[Cell], peers: Sequence[Peer], rounds: int) -> Runs:
    warm_up(cells, peers)
    runs: Runs = {}
    for number in range(rounds):
        for cell in cells:
            for peer in peers_for(cell, peers):
                run = serve(peer, replace(cell, seed=number))
                rate = cell.batch * cell.new_tokens / run.seconds
                print(f"round {number}  {cell.mode:8s} B={cell.batch:<3d}", end="")
                print(f"{peer.name:22s} {rate:7.1f} tok/s", flush=True)
                runs.setdefault((cell, peer.name), []).append(run)
    return runs


def warm_up(cells: Sequence[Cell], peers: Sequence[Peer]) -> None:
    """Two tokens of the largest cell of each mode: adapters are loaded, memory is taken."""
    for cell in {cell.mode: cell for cell in sorted(cells, key=lambda cell: cell.batch)}.values():
        for peer in peers_for(cell, peers):
            print(f"warming up {cell.mode:8s} B={cell.batch:<3d}{peer.name}", flush=True)
            peer.serve(replace(cell, seed=-1, new_tokens=2))


def serve(peer: Peer, cell: Cell) -> Run:
    """A peer that remembers has seen the beginning of these prompts, with other ends, before."""
    if cell.shared_prefix and peer.caches_prefixes:
        peer.serve(replace(cell, seed=-1, new_tokens=1))
    return peer.serve(cell)
