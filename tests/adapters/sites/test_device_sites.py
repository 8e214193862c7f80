"""Device sites: slots come and go without a trace, and memory is given back."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.primitives import low_rank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.adapters.primitives.virtual_tokens import KeyValuePrefix
from deltamux.adapters.sites import device_sites as sites_module
from deltamux_kernels import native
from deltamux_kernels.packed import PackedMatrices

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def folders(save: Make) -> list[Path]:
    """Adapters of one base that share hardly a target."""
    variants: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "r": 4},
        {"target_modules": ["v_proj", "gate_proj"], "r": 7, "use_dora": True},
        {"target_modules": ["k_proj", "lm_head"], "r": 2, "lora_bias": True},
        {"target_modules": ["embed_tokens", "o_proj"], "r": 5},
        {"target_modules": "all-linear", "r": 3},
    ]
    return [save("llama", seed=seed, **variant) for seed, variant in enumerate(variants)]


def test_a_reused_slot_keeps_nothing_of_its_former_adapter(
    folders: list[Path], serve: Make, ids: Tensor
) -> None:
    """Random loads and releases; each answer equals that of a server which knew no other."""
    expected = []
    for folder in folders:
        fresh = serve("llama")
        fresh.load(0, folder)
        expected.append(fresh.logits(ids, [0, None, None, None, None])[0])
    served, rng, loaded = serve("llama"), random.Random(0), dict[int, int]()
    for _ in range(40):
        slot = rng.randrange(4)
        if slot in loaded:
            served.sites.release(slot)
        loaded[slot] = rng.randrange(len(folders))
        served.load(slot, folders[loaded[slot]])
        got = served.logits(ids, [slot, None, None, None, None])[0]
        assert torch.equal(got, expected[loaded[slot]])
    for slot in loaded:
        served.sites.release(slot)
    assert served.sites.used_bytes == 0


def test_a_released_slot_is_the_base_again(
    folders: list[Path], serve: Make, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")
    plain = served.logits(ids, [None] * 5)
    for slot, folder in enumerate(folders):
        served.load(slot, folder)
    for slot in range(len(folders)):
        served.sites.release(slot)
    adapted = count_calls(monkeypatch, sites_module.Site, "_adapt")
    assert torch.equal(served.logits(ids, [0, 1, 2, 3, 4]), plain)
    assert not adapted


def test_rows_are_independent_of_their_neighbours(
    folders: list[Path], serve: Make, ids: Tensor
) -> None:
    served = serve("llama")
    for slot, folder in enumerate(folders):
        served.load(slot, folder)
    alone = served.logits(ids, [None, 1, None, None, None])[1]
    assert torch.equal(served.logits(ids, [0, 1, 2, 3, 4])[1], alone)


def test_the_language_head_reads_the_sampled_rows(
    folders: list[Path], serve: Make, ids: Tensor
) -> None:
    served = serve("llama")
    served.load(0, folders[2])
    slots = [None, 0, None, 0, 0]
    every, last = served.logits(ids, slots), served.logits(ids, slots, last_only=True)
    torch.testing.assert_close(last[:, 0], every[:, -1], atol=1e-5, rtol=1e-5)


def test_an_adapter_takes_what_was_announced(folders: list[Path], serve: Make) -> None:
    served, announced = serve("llama"), 0
    for slot, folder in enumerate(folders):
        announced += served.sites.bytes_of(served.parse(folder))
        served.load(slot, folder)
        assert served.sites.used_bytes == announced
    assert served.sites.used_bytes < served.sites.capacity_bytes == 8 << 20


def test_what_does_not_fit_takes_nothing(folders: list[Path], serve: Make, ids: Tensor) -> None:
    needed = serve("llama").sites.bytes_of(serve("llama").parse(folders[4]))
    served = serve("llama", arena_bytes=needed + 256)
    adapter = served.load(0, folders[4])
    before = served.logits(ids, [0] * 5)
    assert not served.sites.reserve(1, adapter)
    assert served.sites.used_bytes == needed
    assert torch.equal(served.logits(ids, [0] * 5), before)
    served.sites.release(0)
    assert served.sites.reserve(1, adapter)


def test_a_slot_that_was_reserved_but_never_written_can_be_released(
    folders: list[Path], serve: Make
) -> None:
    served = serve("llama")
    assert served.sites.reserve(3, served.parse(folders[0]))
    served.sites.release(3)
    assert served.sites.used_bytes == 0


def test_the_arena_holds_no_host_tensor_after_the_write(folders: list[Path], serve: Make) -> None:
    served = serve("llama")
    served.load(0, folders[0])
    layout = served.sites._layouts[0]
    assert not any(stack.matrices for stack in layout.stacks.values())


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[object]:
    calls: list[object] = []
    original = getattr(module, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_sites_that_read_one_input_share_one_shrink(
    folders: list[Path], serve: Make, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")
    served.load(0, folders[4])
    shrinks = count_calls(monkeypatch, low_rank, "shrink")
    expands = count_calls(monkeypatch, low_rank, "expand")
    served.logits(ids, [0] * 5)
    # A layer: q, k, v share one; gate, up share one; o and down have their own.
    assert (len(shrinks), len(expands)) == (2 * 4, 2 * 7)


def test_no_product_outlives_its_group(folders: list[Path], serve: Make, ids: Tensor) -> None:
    """Also where the last module of a group is not targeted."""
    served = serve("llama")
    served.load(0, folders[0])
    served.load(1, folders[2])
    served.logits(ids, [1, 1, 1, 1, None])
    for site in served.model.modules():
        if isinstance(site, sites_module.Site) and low_rank.LowRank in site.banks:
            assert site.banks[low_rank.LowRank]._shared._product is None


def test_a_step_without_the_adapters_of_a_site_calls_no_bank(
    folders: list[Path], serve: Make, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")
    served.load(0, folders[0])
    adapted = count_calls(monkeypatch, sites_module.Site, "_adapt")
    served.logits(ids, [None] * 5)
    assert not adapted
    served.logits(ids, [0] * 5)
    # q, k, v by their own or their group's targets, and down; o, gate, up, head, embedding idle.
    assert len(adapted) == 2 * 4


def test_the_base_parameters_stay_reachable(serve: Make) -> None:
    served = serve("llama_bias")
    site = served.model.get_submodule("model.layers.0.self_attn.q_proj")
    original = served.base.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(site.weight, original.weight)
    assert torch.equal(site.bias, original.bias)
    assert served.model.get_submodule("model.layers.0.self_attn.o_proj").bias is not None
    assert serve("llama").model.get_submodule("model.layers.0.self_attn.q_proj").bias is None


def test_an_adapter_without_a_product_wakes_no_sibling(
    serve: Make, tune: Make, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    served.load(0, tune("llama", config))
    adapted = count_calls(monkeypatch, sites_module.Site, "_adapt")
    served.logits(ids, [0] * 5)
    assert len(adapted) == 2


def test_captured_steps_are_outgrown_by_what_they_read_alone(
    serve: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of a prefix go to the cache between two steps. The first adapter counts."""
    monkeypatch.setattr(native, "available", lambda: False)
    sites = serve("llama").sites
    payloads: list[tuple[str, Payload]] = [
        ("model.embed_tokens", KeyValuePrefix(torch.zeros(2, 2, 4, 16))),
        ("model.embed_tokens", KeyValuePrefix(torch.zeros(2, 2, 40, 16))),
        ("model.layers.0.self_attn.q_proj", RowBias(torch.zeros(32))),
    ]
    growths = [sites.growth]
    for slot, (name, payload) in enumerate(payloads):
        assert sites.reserve(slot, Adapter("", "", 0, 0, "", {name: (payload,)}))
        growths.append(sites.growth)
    assert growths == [0, 1, 1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_beside_the_steps_is_over_when_it_ends_or_fails(
    folders: list[Path], serve: Make, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Its slot and its memory are others' next, one that has failed has them no longer."""
    order: list[str] = []

    def write(*_: Any) -> None:
        order.append("write")
        if fails:
            raise torch.OutOfMemoryError

    served = serve("llama")
    served.sites._stream = SimpleNamespace(
        wait_stream=order.append, synchronize=lambda: order.append("over")
    )
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "former steps")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(PackedMatrices, "write", write)
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        served.load(0, folders[0])
    assert order[0] == "former steps" and order[-1] == "over"
    assert order.count("write") == len(order) - 2


def test_a_slot_is_emptied_without_the_device_and_leaves_nothing_to_its_next(
    folders: list[Path], serve: Make, ids: Tensor
) -> None:
    """Kernels find matrices in tables, where one that is left would act beside others' there."""
    served = serve("llama")
    sites = served.sites
    served.load(0, folders[4])
    former = dict(sites._layouts[0].stacks)
    with CountedOperations() as operations:
        sites.release(0)
    assert not operations.count
    assert not any(store.rows_of(0) for store in former)
    served.load(0, folders[1])
    left = [store for store in former if store not in sites._layouts[0].stacks]
    assert left and not any(int(store.rows[0]) for store in left)
    served.load(1, folders[4])
    fresh = serve("llama")
    fresh.load(0, folders[1])
    fresh.load(1, folders[4])
    slots = [0, 1, 0, 1, None]
    assert torch.equal(served.logits(ids, slots), fresh.logits(ids, slots))


def test_a_load_that_failed_leaves_nothing_to_the_next_in_its_slot(
    folders: list[Path], serve: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")
    sites, adapter = served.sites, served.parse(folders[4])
    assert sites.reserve(0, adapter)
    former, write = list(sites._layouts[0].stacks), PackedMatrices.write

    def fail_at_last(store: PackedMatrices, *given: Any) -> None:
        write(store, *given)
        if store is former[-1]:
            raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(PackedMatrices, "write", fail_at_last)
        sites.write(0, adapter)
    sites.release(0)
    served.load(0, folders[1])
    left = [store for store in former if store not in sites._layouts[0].stacks]
    assert left and not any(int(store.rows[0]) for store in left)


class CountedOperations(TorchDispatchMode):
    """How often torch is asked for something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
