"""Dense products, replaced and added, against float64, and rows whose slot has none."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import PackedMatrices, Segments
from deltamux_kernels.grouped_dense import (
    dense_delta_torch,
    dense_delta_triton,
    grouped_dense_torch,
    grouped_dense_triton,
)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (70, 33), (64, 130)])
def test_rows_are_replaced_by_the_product_of_their_own_slot(
    inputs: int,
    outputs: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack_in_one: Callable[..., list[PackedMatrices]],
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(inputs)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / inputs**0.5).to(dtype).to(device)

    weights = [normal(outputs, inputs), None, normal(outputs, inputs)]
    biases = [normal(1, outputs), None, None]
    x, before = normal(25, inputs), normal(25, outputs)
    segments = Segments.build([(2, 1, 19), (1, 19, 21), (0, 22, 23)], device)
    expected = before.double()
    for slot, start, end in segments.spans:
        if (weight := weights[slot]) is not None:
            expected[start:end] = x[start:end].double() @ weight.double().T
            if (bias := biases[slot]) is not None:
                expected[start:end] += bias.double()
    y = as_columns(before)
    packed = pack_in_one((weights, inputs), (biases, outputs))
    (grouped_dense_torch if form == "torch" else grouped_dense_triton)(y, x, *packed, segments)
    untouched = [0, 19, 20, 21, 23, 24]
    assert torch.equal(y[untouched], before[untouched])
    assert ((y - expected).abs() <= 8 * torch.finfo(dtype).eps * (1 + expected.abs())).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (70, 33), (64, 130)])
def test_the_product_of_their_own_slot_is_added_to_rows(
    inputs: int,
    outputs: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack: Callable[..., PackedMatrices],
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(inputs)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) / inputs**0.5).to(dtype).to(device)

    deltas = [normal(outputs, inputs), None, normal(outputs, inputs)]
    x, before = normal(25, inputs), normal(25, outputs)
    segments = Segments.build([(2, 1, 19), (1, 19, 21), (0, 22, 23)], device)
    expected = before.double()
    for slot, start, end in segments.spans:
        if (delta := deltas[slot]) is not None:
            expected[start:end] += x[start:end].double() @ delta.double().T
    y = as_columns(before)
    op = dense_delta_torch if form == "torch" else dense_delta_triton
    op(y, x, pack(deltas, inputs), segments)
    untouched = [0, 19, 20, 21, 23, 24]
    assert torch.equal(y[untouched], before[untouched])
    assert ((y - expected).abs() <= 8 * torch.finfo(dtype).eps * (1 + expected.abs())).all()
