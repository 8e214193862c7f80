"""Random mixes of families: what stands beside a row in the batch does not matter to it."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

TARGETS = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
CONFIGS: tuple[peft.PeftConfig, ...] = (
    peft.LoraConfig(r=4, **TARGETS),
    peft.LoraConfig(r=9, use_dora=True, target_modules="all-linear"),
    peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    peft.ShiraConfig(r=2, **TARGETS),
    peft.OFTConfig(r=0, oft_block_size=8, **TARGETS),
    peft.LNTuningConfig(),
)
SLOTS = range(len(CONFIGS))
TOKENS = 5


@pytest.fixture(scope="module")
def logits(serve: Callable, tune: Callable) -> Callable[[Tensor, list[int | None]], Tensor]:
    """logits(ids, slots) of one step over a small Llama, an adapter of another family a slot."""
    served = serve("llama")
    for slot, config in enumerate(CONFIGS):
        served.load(slot, tune("llama", config, seed=slot))
    return served.logits


def prompts(seed: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(61, (rows, TOKENS), generator=generator)


mixed = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@mixed
@given(
    slots=st.lists(st.sampled_from([None, *SLOTS]), min_size=2, max_size=9),
    seed=st.integers(0, 1 << 30),
)
def test_a_row_in_a_mix_is_as_it_is_alone(
    logits: Callable, slots: list[int | None], seed: int
) -> None:
    ids = prompts(seed, len(slots))
    together = logits(ids, slots)
    for row, slot in enumerate(slots):
        alone = logits(ids[row : row + 1], [slot])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5 * alone.abs().max(), rtol=0)


@mixed
@given(
    slots=st.permutations(SLOTS),
    others=st.permutations(SLOTS),
    row=st.integers(0, len(CONFIGS) - 1),
    seed=st.integers(0, 1 << 30),
)
def test_in_batches_of_one_shape_a_rows_bits_do_not_depend_on_its_neighbours(
    logits: Callable, slots: list[int], others: list[int], row: int, seed: int
) -> None:
    ids, neighbours = prompts(seed, len(slots)), prompts(seed + 1, len(slots))
    neighbours[row] = ids[row]
    # The same adapter in this row, the others anywhere.
    place = others.index(slots[row])
    others[place], others[row] = others[row], others[place]
    assert torch.equal(logits(ids, slots)[row], logits(neighbours, others)[row])
