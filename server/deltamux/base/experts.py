"""Mixtures of experts whose weights lie in one parameter for all experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Layers of the experts in the order in which they run.
PROJECTIONS = ("gate_up_proj", "down_proj")


class Experts:
    """What transformers' ExpertsInterface says of a module: weights [experts, out, in], or
    [experts, in, out] where they are transposed, and how gate and up become one."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.count: int = self.module.num_experts

    def weight(self, projection: str) -> Tensor:
        """[experts, out, in], a view."""
        weight: Tensor = getattr(self.module, projection)
        return weight.transpose(1, 2) if self.module.is_transposed else weight

    def bias(self, projection: str) -> Tensor | None:
        """[experts, out], or None."""
        return getattr(self.module, f"{projection}_bias") if self.module.has_bias else None

    def gate(self, gate_up: Tensor) -> Tensor:
        """[rows, out of gate_up_proj] -> [rows, in of down_proj]."""
        gated: Tensor = self.module._apply_gate(gate_up)
        return gated


def find_experts(model: nn.Module) -> tuple[Experts, ...]:
    """The mixtures whose arithmetic is known: gated, on one device, no norm of their own."""
    return tuple(Experts(name, m) for name, m in model.named_modules() if _is_known(m))


def _is_known(module: Any) -> bool:
    if not all(isinstance(getattr(module, name, None), nn.Parameter) for name in PROJECTIONS):
        return False
    return (
        hasattr(module, "_apply_gate")
        and module.has_gate
        # Not every transformers that is served knows such a norm.
        and not getattr(module, "has_post_expert_norm", False)
        and not module._is_expert_parallel
    )
