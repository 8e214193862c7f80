"""Panels of bfloat16 numbers in 16 bits against the same numbers in 32, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltamux_kernels import native
from deltamux_kernels.native.panels import Panels

pytestmark = pytest.mark.skipif(not native.available(), reason="there is no C compiler")

# Zeros, subnormal and largest numbers, infinities, quiet and signalling NaNs, of either sign.
SPECIAL = [0x0000, 0x0001, 0x007F, 0x0080, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF]
NO_BFLOAT16 = 1 + 2**-23


def bits(numbers: Tensor) -> Tensor:
    return numbers.view(torch.int32)


def rounded(*shape: int) -> Tensor:
    """Random bfloat16 numbers in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def wide(matrix: Tensor, bias: Tensor | None = None) -> Panels:
    """The same in 32 bits, with one column more, in which there is another number."""
    column = torch.full((1, matrix.shape[1]), NO_BFLOAT16)
    return Panels(
        torch.cat((matrix, column)), None if bias is None else torch.cat((bias, torch.zeros(1)))
    )


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("columns", "depth"), [(64, 64), (1, 1), (7, 3), (63, 511), (141, 513), (130, 1025)]
)
def test_products_have_the_bits_of_float32(columns: int, depth: int, has_bias: bool) -> None:
    matrix = rounded(columns, depth)
    bias = torch.randn(columns) if has_bias else None
    x = torch.randn(50, depth)
    packed, unpacked = Panels(matrix, bias), wide(matrix, bias)
    exact = x.double() @ matrix.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(packed.product(x).double(), exact, atol=1e-4, rtol=1e-5)
    for rows in range(1, 51):
        expected = unpacked.product(x[:rows])[:, :columns]
        assert torch.equal(bits(packed.product(x[:rows])), bits(expected.contiguous()))


def test_they_take_half_of_the_memory() -> None:
    whole = 256 * 96
    packed = Panels(rounded(256, 96))
    assert packed.memory[1] == 2 * whole
    assert packed.memory[0] % 64 == 0
    assert torch.equal(packed.matrix(), rounded(256, 96))


@pytest.mark.parametrize("place", [(0, 0), (100, 37), (255, 95)])
@pytest.mark.parametrize("number", [NO_BFLOAT16, 1 + 2**-8, 2.0**-149])
def test_one_other_number_keeps_all_in_float32(place: tuple[int, int], number: float) -> None:
    matrix = rounded(256, 96)
    matrix[place] = number
    packed = Panels(matrix)
    assert packed.memory[1] == 4 * matrix.numel()
    assert torch.equal(bits(packed.matrix()), bits(matrix))


def test_special_numbers_keep_their_bits() -> None:
    halves = torch.tensor([sign | half for sign in (0, 0x8000) for half in SPECIAL])
    numbers = (halves << 16).to(torch.int32).view(torch.float32)
    matrix = torch.cat((numbers, rounded(112)))[:, None].contiguous()
    packed = Panels(matrix)
    assert packed.memory[1] < wide(matrix).memory[1]
    assert torch.equal(bits(packed.matrix()), bits(matrix))
    for x in (torch.ones(1, 1), torch.full((9, 1), -0.75), torch.zeros(2, 1)):
        products = packed.product(x)
        expected = wide(matrix).product(x)[:, : len(matrix)].contiguous()
        assert torch.equal(bits(products), bits(expected))
        torch.testing.assert_close(products, 0 + x * matrix.t(), atol=0, rtol=0, equal_nan=True)
