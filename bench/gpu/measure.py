"""One step after another: graphs of every arm, and what each adds to the base alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from gpu.arms import own_arms
from gpu.peer_arms import peer_arms
from gpu.peers import Peers
from gpu.plan import Machine, floor_seconds
from gpu.shapes import LAYERS, LLAMA, Step, steps
from gpu.timing import Layers, capture, interleaved_medians
from gpu.weights import Pool, of_pool

# Seconds of replays of all arms of one step.
REPLAY_SECONDS = 0.6


def measure(peers: Peers, machine: Machine, deadline: float) -> Iterator[dict[str, Any]]:
    """One result a step, until `deadline` (time.monotonic)."""
    device = torch.device("cuda")
    bases = [
        torch.empty(sum(site.outputs), site.width, dtype=torch.bfloat16, device=device).normal_(
            std=site.width**-0.5
        )
        for _ in range(LAYERS)
        for site in LLAMA
    ]
    free = torch.cuda.mem_get_info()[0]
    pool = Pool(int(free * 0.7) // 2, torch.bfloat16, device)
    for step in steps():
        if time.monotonic() > deadline:
            yield {"step": step.name, "not_reached": True}
            continue
        yield _measure(step, peers, machine, bases, pool)
        torch.cuda.empty_cache()


def _measure(
    step: Step,
    peers: Peers,
    machine: Machine,
    bases: list[torch.Tensor],
    pool: Pool,
) -> dict[str, Any]:
    began = time.monotonic()
    sites = [
        of_pool(site, step, base, pool) for site, base in zip(LLAMA * LAYERS, bases, strict=True)
    ]
    layers, captured, failed = Layers(sites, step.rows), {}, {}
    arms = own_arms(sites, step) | peer_arms(peers, sites, step)
    for name, make in arms.items():
        try:
            captured[name] = capture(partial(layers.run, make()))
        except Exception as error:  # one arm less, and the reason in the report
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    medians = interleaved_medians(list(captured.values()), REPLAY_SECONDS)
    base, *others = medians
    floors = [
        1e3 * LAYERS * floor_seconds(LLAMA, step, machine, fused=fused) for fused in (True, False)
    ]
    return {
        "step": step.name,
        "base_ms": base,
        "floor_fused_ms": floors[0],
        "floor_separate_ms": floors[1],
        "adapters_ms": {
            name: median - base for name, median in zip(list(captured)[1:], others, strict=True)
        },
        "failed": failed,
        "seconds": round(time.monotonic() - began, 1),
    }
