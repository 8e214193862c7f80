"""Captured steps of a mixture of experts, whose adapters act inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

from deltamux.adapters.primitives.expert_low_rank import ExpertLowRank
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.engine.replay.step_buffers import StepShape
from deltamux.engine.sequence import Scheduled

DECODING, MIXED = StepShape(3, 3, decodes=True), StepShape(8, 3)
EXPERTS, HIDDEN, INNER = 4, 32, 16
LAYER = "model.layers.0"
GATE_UP, DOWN = f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"
QUERY = f"{LAYER}.self_attn.q_proj"
SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": EXPERTS,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_experts_per_tok=2),
    # Its weights are transposed, and have biases.
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"]
    ),
}

pytestmark = [
    pytest.mark.parametrize("form", ["triton"], indirect=True),
    pytest.mark.skipif(torch.cuda.is_available(), reason="records the operations of a CPU"),
]


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]())


@pytest.fixture
def pair(pair_of: Callable[..., Any]) -> Any:
    return pair_of((DECODING, MIXED))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.3


def low_rank(rank: int) -> dict[str, Any]:
    return {QUERY: (LowRank(normal(rank, HIDDEN), normal(rank, HIDDEN)),)}


def of_gate_up(rank: int) -> dict[str, Any]:
    a, b = normal(EXPERTS, rank, HIDDEN), normal(EXPERTS, rank, 2 * INNER)
    return {GATE_UP: (ExpertLowRank.of(a, b),)}


def of_down(rank: int) -> dict[str, Any]:
    a, b = normal(EXPERTS, rank, INNER), normal(EXPERTS, rank, HIDDEN)
    return {DOWN: (ExpertLowRank.of(a, b),)}


def test_one_capture_a_shape_serves_any_mix(form: str, pair: Any) -> None:
    pair.load(0, of_gate_up(3) | of_down(5))
    pair.load(1, low_rank(4))
    pair.load(2, of_down(16))
    a, b, c = (pair.sequence(slot, 7, slot, 3) for slot in range(3))
    assert pair.step(Scheduled(a, 2), b, c)
    captures, plain = pair.captures, pair.sequence(None, 7, 3)
    assert pair.step(plain, a)
    assert pair.step(plain, pair.sequence(2, *range(6)))
    assert pair.captures == captures
    for step in ((c, plain), (b, plain, a)):
        assert pair.step(*step)
    assert pair.captures == captures + 1


def test_a_slot_has_nothing_of_its_former_adapter(form: str, pair: Any) -> None:
    """Whose experts another adapter keeps awake."""
    pair.load(0, of_down(3))
    pair.load(1, of_down(4))
    assert pair.step(pair.sequence(0, 5), pair.sequence(1, 6))
    captures = pair.captures
    pair.load(0, {})
    assert pair.step(pair.sequence(0, 5), pair.sequence(1, 6)) and pair.captures == captures
    # A matrix that programs captured before do not reach.
    pair.load(0, of_down(40))
    assert pair.step(pair.sequence(0, 5)) and pair.captures == captures + 1
