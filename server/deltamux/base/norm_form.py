"""Which formula a model's norm computes, tried with other parameters than its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltamux.base.agreement import agree, random_rows
from deltamux_kernels.row_norm import NormForm

# Root mean square norms as most models have them, then OLMo's and Gemma's; layer norms last.
_FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"once": True},
    {"once": True, "offset": 1.0},
    {"centred": True},
)


def find_norm_form(norm: nn.Module) -> NormForm | None:
    """The form that agrees with the module's own code on random input, to its dtype's precision.

    None for any other norm. `norm` has a weight [width] and may have a bias.
    """
    epsilon = _epsilon(norm)
    if epsilon is None:
        return None
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    # Parameters are the later rows, as none of them may be small.
    numbers = random_rows(weight, 6, weight.shape[0])
    x, parameters = numbers[:4], numbers[4:5] if bias is None else numbers[4:]
    with torch.inference_mode():
        expected = with_parameters(norm, parameters)(x)
        for fields in _FORMS if bias is None else _FORMS[-1:]:
            form = NormForm(epsilon, **fields)
            if agree(form.norm(x, *parameters), expected):
                return form
    return None


def _epsilon(norm: nn.Module) -> float | None:
    """None if it is in no known attribute."""
    values = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in values if isinstance(value, float)), None)


def with_parameters(norm: nn.Module, parameters: Iterable[Tensor]) -> nn.Module:
    """A copy of a norm that shares all but weight and bias with it."""
    other = copy.copy(norm)
    given: dict[str, Any] = dict(zip(("weight", "bias"), parameters, strict=False))
    other._parameters = norm._parameters | given
    return other
