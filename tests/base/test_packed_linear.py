"""Packed linear layers against the plain product in float64."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from deltamux.base import packed_linear
from deltamux.base.packed_linear import PackedLinear, pack_linears
from deltamux_kernels import native


@pytest.fixture(params=["panels", "onednn"], autouse=True)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With a C compiler, and without."""
    if request.param == "onednn":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("there is no C compiler")
    layout: str = request.param
    return layout


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 70])
@pytest.mark.parametrize("shape", [(96, 40), (513, 130), (1030, 1)])
def test_product_is_that_of_the_plain_layer(shape: tuple[int, int], rows: int, bias: bool) -> None:
    plain = nn.Linear(*shape, bias=bias).requires_grad_(False)
    x = torch.randn(1, rows, shape[0])
    exact = linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    torch.testing.assert_close(PackedLinear(plain)(x).double(), exact, atol=1e-5, rtol=1e-5)


def test_rows_may_be_strided() -> None:
    plain = nn.Linear(96, 40).requires_grad_(False)
    for x in (
        torch.randn(2, 9, 96)[:, 1::2],
        torch.randn(96, 9).t(),
        torch.randn(1, 96).expand(7, 96),
    ):
        torch.testing.assert_close(PackedLinear(plain)(x), plain(x), atol=1e-5, rtol=1e-5)


def test_weight_unpacks_to_the_same_bits() -> None:
    plain = nn.Linear(96, 141).requires_grad_(False)
    packed = PackedLinear(plain)
    assert torch.equal(packed.weight, plain.weight)
    assert packed.bias is plain.bias
    assert (packed.in_features, packed.out_features) == (96, 141)


def test_row_does_not_depend_on_how_many_stand_beside_it() -> None:
    packed = PackedLinear(nn.Linear(700, 200).requires_grad_(False))
    x = torch.randn(70, 700)
    together = packed(x)
    for rows in (1, 2, 3, 4, 5, 6, 8, 16, 17, 33, 50):
        assert torch.equal(packed(x[:rows]), together[:rows])


def test_row_does_not_depend_on_how_many_threads_there_are(layout: str) -> None:
    if layout == "onednn":
        pytest.skip("nobody promises it")
    packed = PackedLinear(nn.Linear(700, 200).requires_grad_(False))
    x, before = torch.randn(70, 700), torch.get_num_threads()
    together = packed(x)
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(packed(x), together)
    finally:
        torch.set_num_threads(before)


def test_only_float32_linears_are_packed() -> None:
    class Router(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "router": Router(8, 8),
            "bfloat16_linear": nn.Linear(8, 8, dtype=torch.bfloat16),
        }
    )
    pack_linears(model)
    assert {name: type(module) for name, module in model.items()} == {
        "linear": PackedLinear,
        "router": Router,
        "bfloat16_linear": nn.Linear,
    }
    assert len(list(model["linear"].parameters())) == 1


def test_plain_layers_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    plain = [weakref.ref(layer.weight) for layer in model]
    alive = []

    class Watched(PackedLinear):
        def __init__(self, linear: nn.Linear) -> None:
            alive.append(sum(weight() is not None for weight in plain))
            super().__init__(linear)

    monkeypatch.setattr(packed_linear, "PackedLinear", Watched)
    pack_linears(model)
    assert alive == [3, 2, 1]
