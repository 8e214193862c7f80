"""Reads the tensors of an adapter: safetensors only, checked before and after."""

from __future__ import annotations

import math
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.files import WEIGHTS, open_weights
from deltamux.adapters.checkpoint.header import TensorInfo, read_header
from deltamux.errors import InvalidArgument

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of adapter_model.safetensors by name, on the host, in the file's dtypes.

    Raises InvalidArgument for a file that is not sound, or holds a NaN or an infinity.
    """
    with open_weights(folder) as file:
        # Of the file that was checked, whatever has its name by now.
        return {name: _read(file, name, info) for name, info in read_header(file).items()}


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises InvalidArgument (NON_FINITE) if `tensor` holds a NaN or an infinity."""
    # Either makes the sum no number, as large numbers may, too. Nothing else is as fast.
    if math.isfinite(tensor.sum().item()):
        return
    low, high = tensor.aminmax()
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise InvalidArgument(f"{name} holds NaN or infinity", reason="NON_FINITE")


def _read(file: BufferedReader, name: str, info: TensorInfo) -> Tensor:
    """The file's next tensor, in memory of its own; nothing else has its bytes in between."""
    tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    size = file.readinto(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
    if size < info.size:
        message = f"{WEIGHTS} is malformed: it ends in {name}"
        raise InvalidArgument(message, reason="MALFORMED_WEIGHTS")
    require_finite(name, tensor)
    return tensor
