"""Which formula a model's norm computes, tried with other parameters than its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltamux.base.agreement import agree, random_rows
from deltamux_kernels.row_norm import NormForm


def find_norm_form(norm: nn.Module) -> NormForm | None:
    """The form that agrees with the module's own code on random input, to its dtype's precision.

    None for any other norm, such as Gemma's, which adds 1 to its weight, or OLMo's, which rounds
    elsewhere in 16 bits. `norm` has a weight [width] and may have a bias.
    """
    name = epsilon_name(norm)
    if name is None:
        return None
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    # Parameters are the later rows, as none of them may be small.
    numbers = random_rows(weight, 6, weight.shape[0])
    x, parameters = numbers[:4], numbers[4:5] if bias is None else numbers[4:]
    with torch.inference_mode():
        expected = with_parameters(norm, parameters)(x)
        for centred in (False, True) if bias is None else (True,):
            form = NormForm(getattr(norm, name), centred)
            if agree(form.norm(x, *parameters), expected):
                return form
    return None


def epsilon_name(norm: nn.Module) -> str | None:
    """The attribute in which a norm has its epsilon; None if in no known one."""
    names = (n for n in ("variance_epsilon", "eps") if isinstance(getattr(norm, n, None), float))
    return next(names, None)


def with_parameters(norm: nn.Module, parameters: Iterable[Tensor]) -> nn.Module:
    """A copy of a norm that shares all but weight and bias with it."""
    other = copy.copy(norm)
    given: dict[str, Any] = dict(zip(("weight", "bias"), parameters, strict=False))
    other._parameters = norm._parameters | given
    return other
