"""Times the decode attention of one step on the CPU against other ways to do the same.

Every arm runs the 12 layers of the 125 M model in turn, so that keys and values are cold in the
cache as they are while serving. Arms are interleaved, and the figure is the median of CPU time,
which a busy machine distorts least.

    python bench/bench_paged_attention.py --json out.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cpu.harness import command, medians_of
from torch.nn.functional import scaled_dot_product_attention

from deltamux_kernels import AttentionBatch, paged_attention
from deltamux_kernels.paged_attention_torch import paged_attention_torch
from deltamux_kernels.scoring import Scoring

LAYERS, HEADS, KV_HEADS, DIM, BLOCK_SIZE = 12, 12, 4, 64, 16


@dataclass(frozen=True)
class Layer:
    """One layer's pages and, for the arm without pages, the same in a row."""

    key_cache: torch.Tensor  # [blocks, BLOCK_SIZE, KV_HEADS, DIM]
    value_cache: torch.Tensor
    keys: torch.Tensor  # [B, KV_HEADS, context, DIM]
    values: torch.Tensor


def deltamux(query: torch.Tensor, layer: Layer, batch: AttentionBatch) -> torch.Tensor:
    return paged_attention(query, layer.key_cache, layer.value_cache, batch, scale=DIM**-0.5)


def in_torch(query: torch.Tensor, layer: Layer, batch: AttentionBatch) -> torch.Tensor:
    """What serves half types, and machines without a compiler."""
    scoring = Scoring(DIM**-0.5, None, None, None)
    return paged_attention_torch(query, layer.key_cache, layer.value_cache, batch, scoring)


def repeated_kv(query: torch.Tensor, layer: Layer, batch: AttentionBatch) -> torch.Tensor:
    """Dense keys and values without pages, repeated for every query head."""
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (layer.keys, layer.values))
    return scaled_dot_product_attention(query[:, :, None], keys, values)[:, :, 0]


ARMS: dict[str, Callable[[torch.Tensor, Layer, AttentionBatch], torch.Tensor]] = {
    "deltamux": deltamux,
    "in_torch": in_torch,
    "repeated_kv_without_pages": repeated_kv,
}


def step(contexts: list[int]) -> tuple[list[Layer], AttentionBatch, torch.Tensor]:
    """Twelve layers of shuffled pages for one decode step."""
    sequences, columns = len(contexts), -(-max(contexts) // BLOCK_SIZE)
    blocks = sequences * columns
    shape = (blocks, BLOCK_SIZE, KV_HEADS, DIM)
    dense = (sequences, KV_HEADS, max(contexts), DIM)
    layers = [
        Layer(torch.randn(shape), torch.randn(shape), torch.randn(dense), torch.randn(dense))
        for _ in range(LAYERS)
    ]
    batch = AttentionBatch(
        (1,) * sequences,
        tuple(contexts),
        torch.arange(sequences + 1, dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        torch.randperm(blocks).view(sequences, columns).int(),
    )
    return layers, batch, torch.randn(sequences, HEADS, DIM)


def measure(name: str, contexts: list[int], repeats: int) -> dict[str, object]:
    """Median milliseconds of each arm over all layers."""
    layers, batch, query = step(contexts)
    # Dense tensors have one length, so the arm without pages stands beside equal contexts only.
    arms = [arm for arm in ARMS if len(set(contexts)) == 1 or arm != "repeated_kv_without_pages"]

    def run(arm: str) -> None:
        batch.plans.clear()  # every step plans once
        for layer in layers:
            ARMS[arm](query, layer, batch)

    medians = medians_of({arm: lambda arm=arm: run(arm) for arm in arms}, repeats)
    return {
        "case": name,
        "median_cpu_ms": {arm: round(value, 2) for arm, value in medians.items()},
        "over_deltamux": {
            arm: round(value / medians["deltamux"], 2) for arm, value in medians.items()
        },
    }


def cases(repeats: int) -> list[dict[str, object]]:
    return [
        measure("16 sequences of 192", [192] * 16, repeats),
        measure("16 sequences of 16 to 376", list(range(16, 385, 24)), repeats),
        measure("1 sequence of 192", [192], repeats),
        measure("16 sequences of 1000", [1000] * 16, repeats),
        measure("1 sequence of 4000", [4000], repeats),
    ]


if __name__ == "__main__":
    command(__doc__, cases, {"layers": LAYERS})
