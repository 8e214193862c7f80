"""Sites: at linear layers that share one product, as without it and as in PEFT; of no rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deltamux.base.stacked_linears import StackedLinear
from deltamux_kernels.segments import Segments

CPU = torch.device("cpu")
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
# What acts on outputs, in place, and what reads the base's weight.
AFTER: tuple[peft.PeftConfig, ...] = (
    LORA,
    peft.LoraConfig(r=9, use_dora=True, target_modules="all-linear"),
    peft.RoadConfig(group_size=8, target_modules=["q_proj", "k_proj", "gate_proj"]),
    peft.ShiraConfig(r=2, target_modules=["k_proj", "gate_proj"]),
)
# What gives single members an input of their own.
BEFORE: tuple[peft.PeftConfig, ...] = (
    peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "up_proj"]),
    peft.OFTConfig(r=0, oft_block_size=8, target_modules="all-linear"),
    peft.IA3Config(
        target_modules=["k_proj", "v_proj", "gate_proj"],
        feedforward_modules=["v_proj", "gate_proj"],
    ),
    LORA,
)


@pytest.mark.parametrize("configs", [AFTER, BEFORE], ids=["outputs", "inputs"])
@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen3"])
def test_rows_over_stacked_linears_are_those_of_peft(
    name: str,
    configs: tuple[peft.PeftConfig, ...],
    serve: Callable,
    tune: Callable,
    reference: Callable,
    base: Callable,
    ids: Tensor,
) -> None:
    served = serve(name, stacked=True)
    assert any(isinstance(module, StackedLinear) for module in served.model.modules())
    folders: list[Path] = [tune(name, config, seed) for seed, config in enumerate(configs)]
    for slot, folder in enumerate(folders):
        served.load(slot, folder)
    rows = ids[: 1 + len(folders)]
    mixed = served.logits(rows, [None, *range(len(folders))])
    with torch.no_grad():
        torch.testing.assert_close(mixed[0], base(name)(rows[:1]).logits[0], atol=3e-5, rtol=1e-5)
    for row, folder in enumerate(folders, start=1):
        expected = reference(name, folder, rows[row : row + 1])[0]
        torch.testing.assert_close(mixed[row], expected, atol=3e-5, rtol=1e-5)


def test_inputs_of_their_own_cost_no_products_of_the_siblings(
    serve: Callable, tune: Callable, ids: Tensor
) -> None:
    folder = tune("llama", peft.OFTConfig(r=0, oft_block_size=8, target_modules="all-linear"))
    work = []
    for stacked in (False, True):
        served = serve("llama", stacked=stacked)
        served.load(0, folder)
        with FlopCounterMode(display=False) as counter:
            served.logits(ids, [0, None, 0, None, None])
        work.append(counter.get_total_flops())
    assert work[0] == work[1]


def test_all_that_acts_at_a_head_takes_a_step_that_samples_nothing(serve: Callable) -> None:
    """One that brings chunks of prompts alone."""
    served = serve("llama")
    head = served.model.lm_head
    for acting in (head, *head.banks.values()):
        acting.slots.add(0)
    served.rows.set(Segments.build([(0, 0, 3)], CPU), Segments.build([], CPU))
    assert head(torch.empty(1, 0, head.spec.in_features)).shape == (1, 0, head.spec.out_features)
