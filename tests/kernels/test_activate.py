"""Bias and activation of a shrunk product against float64, up to the bias that follows."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltamux_kernels import ALIGNMENT, Columns, PackedMatrices, Segments
from deltamux_kernels.activate import ACTIVATIONS, Activations, activate_torch, activate_triton
from deltamux_kernels.expand import expand
from deltamux_kernels.shrink import shrink_torch, shrink_triton

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: x.clamp(min=0) + 0.01 * x.clamp(max=0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}
WIDTH, OUTPUTS = 600, 40
# A prefill beside others, and a decode step of many.
STEPS = {
    "prefill": [(2, 1, 19), (1, 19, 21), (0, 22, 23)],
    "decode": [(2, 1, 2), (0, 2, 3), (1, 3, 4), (2, 4, 5), (0, 5, 6)],
}


def test_each_activation_has_a_formula() -> None:
    assert tuple(FORMULAS) == ACTIVATIONS


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_bottleneck_of_each_slot_is_that_of_the_formula(
    name: str,
    step: str,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    place: Callable[..., None],
) -> None:
    """Through shrink and expand, whose planes and matrices it stands between."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).to(device)

    # A width of its own each; the other slot has another function, and one slot has nothing.
    widths, names = [3, None, 33], [ACTIVATIONS[-2], None, name]
    arena = torch.full((1 << 17,), torch.nan, dtype=dtype, device=device)
    down, up = (PackedMatrices(arena, 3, width) for width in (WIDTH, OUTPUTS))
    activations = Activations(arena, 3)
    x, before = normal(25, WIDTH), normal(25, OUTPUTS)
    weights: dict[int, tuple[str, Tensor, Tensor, Tensor]] = {}
    for slot, (width, function) in enumerate(zip(widths, names, strict=True)):
        if width is not None and function is not None:
            d, b = normal(width, WIDTH) / WIDTH**0.5, normal(width) * 2
            weights[slot] = function, d, b, normal(width + 1, OUTPUTS)
            column = activations.column(b, function)
            place(slot, (down, d), (up, weights[slot][3]), (activations.packed, column))
            activations.placed(slot)
    expected, untouched = before.double(), torch.ones(25, dtype=torch.bool)
    for slot, start, end in STEPS[step]:
        if slot in weights:
            function, d, b, u = weights[slot]
            a = FORMULAS[function](x[start:end].double() @ d.double().T + b.double())
            expected[start:end] += a @ u[:-1].double() + u[-1].double()
            untouched[start:end] = False
    segments = Segments.build(STEPS[step], device)
    if form == "torch":
        a = activate_torch(shrink_torch(x, down, segments), activations, segments)
    else:
        a = activate_triton(shrink_triton(x, down, segments), activations, segments)
    y = before.clone()
    expand(y, a, up, Columns(3, device), segments)
    assert torch.equal(y[untouched], before[untouched])
    assert ((y - expected).abs() <= 40 * torch.finfo(dtype).eps * (1 + expected.abs())).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_large_arguments_stay_finite(
    name: str, form: str, device: torch.device, place: Callable[..., None]
) -> None:
    activations = Activations(torch.zeros(64, device=device), 1)
    place(0, (activations.packed, activations.column(torch.tensor([1e4, -1e4]), name)))
    activations.placed(0)
    segments = Segments.build([(0, 0, 1)], device)
    if form == "torch":
        (result,) = activate_torch([torch.zeros(1, 2)], activations, segments)
    else:
        result = activate_triton(torch.zeros(1, 16, device=device), activations, segments)
    assert result is not None
    values = FORMULAS[name](torch.tensor([1e4, -1e4], dtype=torch.float64))
    torch.testing.assert_close(result[0, :3].cpu(), torch.cat((values, torch.ones(1))).float())


@pytest.fixture
def place() -> Callable[..., None]:
    """place(slot, (store, matrix), ...): one after the other in the stores' arena."""
    end = 0

    def place(slot: int, *pieces: tuple[PackedMatrices, Tensor]) -> None:
        nonlocal end
        for store, matrix in pieces:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            store.write(slot, offset, matrix)
            end = offset + matrix.numel() + 1

    return place
