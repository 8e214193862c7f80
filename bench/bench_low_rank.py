"""Times the low-rank ops of one decode step on the CPU against other ways to do the same.

python bench/bench_low_rank.py --json out.json
"""

from __future__ import annotations

from dataclasses import dataclass

import peft
import torch
from cpu.harness import CPU, Site, bench_sites
from cpu.packing import Packer
from torch import nn

from deltamux_kernels import Columns, Segments, expand, shrink

RANKS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Layer:
    """One layer that reads a shared input: each adapter's A and B."""

    a: list[torch.Tensor]  # per slot [rank, K]
    b: list[torch.Tensor]  # per slot [rank, N]


class LowRankSite(Site):
    """Layers that share an input, with their adapters packed, padded, and as PEFT holds them."""

    arms = ("deltamux", "loop_over_adapters", "peft_with_base", "padded_bmm")
    single_row_arms = ("padded_bmm",)

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        ranks = [RANKS[slot % len(RANKS)] for slot in range(slots)]
        self.layers = [
            Layer(
                [torch.randn(rank, width) for rank in ranks],
                [torch.randn(rank, n) * 0.01 for rank in ranks],
            )
            for n in outputs
        ]
        packer = Packer(sum(ranks) * (width * len(outputs) + sum(outputs)) + 2**16 * slots)
        stacked = [torch.cat([layer.a[slot] for layer in self.layers]) for slot in range(slots)]
        self.a = packer.stored(stacked)
        self.b = [packer.stored(layer.b) for layer in self.layers]
        self.columns = [Columns(slots, CPU) for _ in outputs]
        for index, columns in enumerate(self.columns):
            for slot, rank in enumerate(ranks):
                columns.set(slot, index * rank)
        self.peft_layers = peft_layers(width, outputs, ranks)
        self.padded = [
            (_padded(layer.a).transpose(1, 2).contiguous(), _padded(layer.b))
            for layer in self.layers
        ]

    def deltamux(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        h = shrink(x, self.a, segments)
        for y, b, columns in zip(ys, self.b, self.columns, strict=True):
            expand(y, h, b, columns, segments)

    def loop_over_adapters(
        self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments
    ) -> None:
        """Each layer, each adapter, its rows side by side."""
        for layer, y in zip(self.layers, ys, strict=True):
            for slot, start, end in segments.spans:
                y[start:end].addmm_(x[start:end] @ layer.a[slot].t(), layer.b[slot])

    def peft_with_base(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        """PEFT's own layers with a name for every row; the base's product is inside."""
        names = [str(slot) for slot, start, end in segments.spans for _ in range(start, end)]
        for layer, y in zip(self.peft_layers, ys, strict=True):
            y.copy_(layer(x, adapter_names=names))

    def padded_bmm(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        """Every adapter padded to the largest rank; one row each, so no gather is needed."""
        for (a, b), y in zip(self.padded, ys, strict=True):
            y += torch.bmm(torch.bmm(x[:, None], a), b)[:, 0]


def peft_layers(width: int, outputs: tuple[int, ...], ranks: list[int]) -> list[nn.Module]:
    """LoRA layers of PEFT, one an output, with an adapter "0", "1", ... for each rank."""
    base = nn.Sequential(*(nn.Linear(width, n, bias=False) for n in outputs))
    targets = [str(index) for index in range(len(outputs))]
    configs = [peft.LoraConfig(r=rank, target_modules=targets) for rank in ranks]
    model = peft.get_peft_model(base, configs[0], adapter_name="0")
    for slot, config in list(enumerate(configs))[1:]:
        model.add_adapter(str(slot), config)
    return list(model.eval().base_model.model)


def _padded(matrices: list[torch.Tensor]) -> torch.Tensor:
    most = max(matrix.shape[0] for matrix in matrices)
    stacked = torch.zeros(len(matrices), most, matrices[0].shape[1])
    for rows, matrix in zip(stacked, matrices, strict=True):
        rows[: matrix.shape[0]] = matrix
    return stacked


if __name__ == "__main__":
    bench_sites(LowRankSite, __doc__)
