"""Float32 numbers as they are served, rounded once."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.tensors import require_finite
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec


def to_serving(site: SiteSpec, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as a payload holds it; raises InvalidArgument where rounding makes it infinite."""
    tensor = tensor.to(dtype).contiguous()
    require_finite(f"{site.name}, scaled and in {dtype},", tensor)
    return tensor


def rounded(site: SiteSpec, payload: Payload, dtype: torch.dtype) -> Payload:
    """The payload as it is served. Raises InvalidArgument where rounding makes it infinite."""
    tensors: dict[str, Any] = {
        field.name: to_serving(site, value, dtype)
        for field in dataclasses.fields(payload)
        if isinstance(value := getattr(payload, field.name), Tensor) and value.is_floating_point()
    }
    return dataclasses.replace(payload, **tensors)
