"""Times a bottleneck, W_up f(W_down x + b) + b_up, on the CPU against other ways to do the same.

python bench/bench_bottleneck.py --json out.json
"""

from __future__ import annotations

import torch
from cpu.harness import CPU, Site, bench_sites
from cpu.packing import Packer

from deltamux_kernels import Columns, Segments, activate, expand, shrink
from deltamux_kernels.activate import Activations

WIDTHS = (16, 48)


class BottleneckSite(Site):
    """Bottlenecks of two widths with ReLU; what follows them is a bias and the up-projection."""

    arms = ("deltamux", "loop_over_adapters", "padded_bmm")
    single_row_arms = ("padded_bmm",)

    def __init__(self, width: int, outputs: tuple[int, ...], slots: int) -> None:
        widths = [WIDTHS[slot % len(WIDTHS)] for slot in range(slots)]
        self.down = [torch.randn(inner, width) for inner in widths]
        self.bias = [torch.randn(inner) for inner in widths]
        # The last row of each is the bias behind the up-projection.
        self.up = [[torch.randn(inner + 1, n) for inner in widths] for n in outputs]
        packer = Packer(sum(widths) * 2 * (width + sum(outputs)) + 2**17 * slots)
        self.a = packer.stored(self.down)
        self.b = [packer.stored(layer) for layer in self.up]
        self.columns = Columns(slots, CPU)
        self.activations = Activations(packer.arena, slots)
        for slot, bias in enumerate(self.bias):
            packer.write(self.activations.packed, slot, Activations.column(bias, "relu"))
            self.activations.placed(slot)
        most = max(widths)
        self.padded_a = torch.stack([_padded(matrix, most).t() for matrix in self.down])
        self.padded_bias = torch.stack([_padded(bias[:, None], most)[:, 0] for bias in self.bias])
        self.padded_b = [
            torch.stack([_padded(matrix[:-1], most) for matrix in layer]) for layer in self.up
        ]
        self.last = [torch.stack([matrix[-1] for matrix in layer]) for layer in self.up]

    def deltamux(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        h = activate(shrink(x, self.a, segments), self.activations, segments)
        for y, b in zip(ys, self.b, strict=True):
            expand(y, h, b, self.columns, segments)

    def loop_over_adapters(
        self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments
    ) -> None:
        for slot, start, end in segments.spans:
            h = torch.addmm(self.bias[slot], x[start:end], self.down[slot].t()).relu_()
            for y, up in zip(ys, self.up, strict=True):
                y[start:end] += torch.addmm(up[slot][-1], h, up[slot][:-1])

    def padded_bmm(self, x: torch.Tensor, ys: list[torch.Tensor], segments: Segments) -> None:
        h = torch.baddbmm(self.padded_bias[:, None], x[:, None], self.padded_a).relu_()
        for y, b, last in zip(ys, self.padded_b, self.last, strict=True):
            y += torch.baddbmm(last[:, None], h, b)[:, 0]


def _padded(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))


if __name__ == "__main__":
    bench_sites(BottleneckSite, __doc__)
