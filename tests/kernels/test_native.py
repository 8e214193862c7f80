"""What holds for every operation in C: it is chosen where it can be, and each row is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from deltamux_kernels import native, rms_norm, rotary

ROWS, WIDTH, HEADS = 70, 740, 5


def norm(x: Tensor) -> Tensor:
    return rms_norm(x, torch.linspace(-1, 1, WIDTH), 1e-6)


def rotate(x: Tensor) -> Tensor:
    heads = x.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
    query, key = rotary(heads, heads[:, 1:3], heads[:, 0], heads[:, 4])
    return torch.cat((query, key), dim=1).transpose(1, 2).flatten(2)[0]


OPERATIONS = {"norm": norm, "rotate": rotate}
Operation = Callable[[Tensor], Tensor]


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Operation:
    return OPERATIONS[request.param]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[1, 2, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(not native.available(), reason="there is no C compiler")
def test_a_rows_bits_depend_on_nothing_beside_it(
    operation: Operation, x: Tensor, threads: int
) -> None:
    together = operation(x)
    for row in range(ROWS):
        assert torch.equal(together[row : row + 1], operation(x[row : row + 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_torch_computes_the_same(
    operation: Operation, x: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = x.to(dtype)
    y = operation(x)
    monkeypatch.setattr(native, "available", lambda: False)
    torch.testing.assert_close(operation(x), y)
