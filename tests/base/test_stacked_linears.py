"""Stacked linear layers: the same numbers from fewer products, never those of another input."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.base.stacked_linears import SharedProduct, StackedLinear, stack_linears
from deltamux.base.structure import find_structure

LAYERS = 2
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES = (24, 8, 16)
# Without counts of changes in place, and with them.
MODES = (torch.inference_mode, torch.no_grad)

STACKED: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
}
FUSED_ALREADY: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=LAYERS, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "phi3": lambda: transformers.Phi3Config(**SMALL, pad_token_id=0),
}


class Products(TorchDispatchMode):
    """Counts matrix products, whichever operation they are in a mode."""

    _OPERATIONS = frozenset(
        getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "linear")
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self._OPERATIONS
        return func(*args, **kwargs or {})


def build(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    return model


def stacked(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    stack_linears(model, find_structure(model))
    return model


def members_of(model: nn.Module) -> list[StackedLinear]:
    return [module for module in model.modules() if isinstance(module, StackedLinear)]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def plain(request: pytest.FixtureRequest) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(32, size, bias=request.param).requires_grad_(False) for size in SIZES]


@pytest.fixture
def members(plain: list[nn.Linear]) -> list[StackedLinear]:
    biased = plain[0].bias is not None
    bias = torch.cat([linear.bias for linear in plain]) if biased else None
    product = SharedProduct(torch.cat([linear.weight for linear in plain]), bias, SIZES)
    return [StackedLinear(product, index) for index in range(len(SIZES))]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest):
    with request.param():
        yield request.param


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STACKED)
def test_logits_are_those_of_the_plain_model(name: str, ids: Tensor) -> None:
    model = build(STACKED[name]())
    other = stacked(model)
    assert len(members_of(other)) == LAYERS * 5
    for mode in MODES:
        with mode():
            close(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mode", MODES)
def test_five_linears_of_a_layer_are_two_products(mode: Callable, ids: Tensor) -> None:
    model = stacked(build(STACKED["llama"]()))
    with mode(), Products() as products:
        model(ids)
    assert products.count == LAYERS * (2 + 2) + 1


@pytest.mark.parametrize("name", FUSED_ALREADY)
def test_what_reads_its_input_alone_is_left_alone(name: str, ids: Tensor) -> None:
    model = build(FUSED_ALREADY[name]())
    before = [type(module) for module in model.modules()]
    other = stacked(model)
    assert [type(module) for module in other.modules()] == before


def test_no_weight_is_held_twice() -> None:
    model = build(STACKED["qwen2"]())
    structure = find_structure(model)
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    originals = [weakref.ref(model.get_submodule(name).weight) for name in (q, up)]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    values = structure.weight(up).clone(), structure.bias(q).clone()
    stack_linears(model, structure)
    assert [original() for original in originals] == [None, None]
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    held = sum(storage.nbytes() for storage in storages.values())
    assert held == sum(p.numel() * p.element_size() for p in model.parameters())
    for member in members_of(model):
        weight, computing = member.weight, member._product._weight
        assert weight.untyped_storage().data_ptr() == computing.untyped_storage().data_ptr()
    assert torch.equal(structure.weight(up), values[0])
    assert torch.equal(structure.bias(q), values[1])
    assert structure.module(up) is model.get_submodule(up)


def test_linears_that_differ_in_kind_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = build(STACKED["llama"]())
    first = model.model.layers[0]
    first.self_attn.q_proj.bias = nn.Parameter(torch.ones(32), requires_grad=False)
    first.mlp.up_proj = Own(32, 48, bias=False)
    other = stacked(model)
    assert not members_of(other.model.layers[0])
    assert len(members_of(other.model.layers[1])) == 5


def test_rows_are_those_of_each_linear(plain, members, mode) -> None:
    x = torch.randn(2, 5, 32)
    with Products() as products:
        results = [member(x) for member in members]
    assert products.count == 1
    for linear, result in zip(plain, results, strict=True):
        close(result, linear(x))


def test_what_is_done_to_one_result_is_not_seen_in_the_others(plain, members, mode) -> None:
    x = torch.randn(5, 32)
    first = members[0](x)
    first.fill_(torch.nan)
    second = members[1](x)
    second.add_(torch.nan)
    close(members[2](x), plain[2](x))


@pytest.mark.parametrize("order", [(1,), (2,), (2, 1, 0), (1, 0, 2), (0, 2, 1), (0, 0), (0, 1, 1)])
def test_any_order_of_calls(order, plain, members, mode) -> None:
    x = torch.randn(5, 32)
    for index in order * 2:
        result = members[index](x)
        close(result, plain[index](x))
        result.fill_(torch.nan)


def test_other_inputs_get_products_of_their_own(plain, members, mode) -> None:
    x, alike, other = torch.randn(5, 32), torch.randn(5, 32), torch.randn(3, 32)
    members[0](x)
    close(members[1](other), plain[1](other))
    close(members[2](alike), plain[2](alike))
    members[0](x)
    close(members[1].alone(other), plain[1](other))
    close(members[2].alone(other), plain[2](other))
    close(members[1](x), plain[1](x))


def test_change_of_the_input_is_seen(plain, members) -> None:
    x = torch.randn(5, 32)
    members[0](x)
    x.mul_(2)
    close(members[1](x), plain[1](x))
    x[0].zero_()
    close(members[2](x), plain[2](x))


def test_an_input_that_is_filled_anew_for_each_step(plain, members, mode) -> None:
    x = torch.randn(5, 32)
    for _ in range(2):
        for linear, member in zip(plain, members, strict=True):
            close(member(x), linear(x))
        x.add_(1)


@pytest.mark.parametrize("last", [2, "alone"])
def test_nothing_is_kept_behind_the_last(last, members, mode) -> None:
    x = torch.randn(5, 32)
    y = weakref.ref(members[0](x))
    input_of_step = weakref.ref(x)
    if last == "alone":
        members[2].alone(torch.randn(1, 32))
    else:
        members[last](x)
    del x
    assert input_of_step() is None and y() is None


def test_step_that_broke_off_leaves_nothing_to_the_next(plain, members, mode) -> None:
    x = torch.randn(5, 32)
    members[0](x)
    with pytest.raises(RuntimeError):
        members[1](torch.randn(5, 31))
    broken_off = weakref.ref(x)
    x = torch.randn(5, 32)
    for linear, member in zip(plain, members, strict=True):
        close(member(x), linear(x))
    assert broken_off() is None
