"""Bottlenecks of several slots at the end of one sublayer against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from deltamux.adapters.primitives.bottleneck import (
    Bottleneck,
    BottleneckBank,
    OutputBottleneck,
    Residual,
    read_output,
    read_residual,
    read_sum,
)
from deltamux_kernels.segments import Segments

HIDDEN = 9


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def layer_norm(x: Tensor, norm: Tensor | None) -> Tensor:
    if norm is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * norm[0].double() + norm[1].double()


def formula(payload: Bottleneck, z: Tensor) -> Tensor:
    z = layer_norm(z.double(), payload.norm_before)
    a = torch.tanh(z @ payload.down.double().T + payload.bias.double())
    return layer_norm(a @ payload.up[:-1].double() + payload.up[-1].double(), payload.norm_after)


@pytest.mark.parametrize("reads", ["output", "residual", "sum", "normed sum"])
def test_each_slot_adds_its_own_of_what_is_read(
    reads: str, arena: Tensor, segments: Segments, place: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(HIDDEN)
    nn.init.normal_(norm.weight).requires_grad_(False)
    read = {
        "output": read_output,
        "residual": read_residual,
        "sum": read_sum(None),
        "normed sum": read_sum(norm.requires_grad_(False)),
    }[reads]
    residual = Residual()
    bank = BottleneckBank(arena, 4, HIDDEN, residual, read)

    def payload(width: int, before: bool, after: bool) -> Bottleneck:
        norms = [normal(2, HIDDEN) if present else None for present in (before, after)]
        matrices = normal(width, HIDDEN), normal(width), "tanh", normal(width + 1, HIDDEN)
        return OutputBottleneck(*matrices, *norms)

    payloads = {0: payload(3, True, False), 1: payload(5, False, True)}
    place(bank, payloads)
    y, residual.tensor = normal(10, HIDDEN), normal(2, 5, HIDDEN)
    before, around = y.clone(), residual.tensor.clone()
    total = (y + around.view(10, HIDDEN)).double()
    z = {
        "output": y.double(),
        "residual": around.view(10, HIDDEN).double(),
        "sum": total,
        "normed sum": layer_norm(total, torch.stack((norm.weight, norm.bias))),
    }[reads]
    expected = y.double()
    for slot, start, end in ((1, 2, 4), (0, 6, 10)):
        expected[start:end] += formula(payloads[slot], z[start:end])
    bank.after(normal(10, 1), y, segments)
    torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(y[[0, 1, 4, 5]], before[[0, 1, 4, 5]])
    assert torch.equal(residual.tensor, around)
