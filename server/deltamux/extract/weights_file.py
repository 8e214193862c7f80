"""Writes adapter_model.safetensors tensor by tensor: only one is in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.tensors import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightsFile:
    """A safetensors file in the making; complete when the `with` block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # The header comes first and is known last, so the data waits in a file of its own.
        self._data_path = path.with_suffix(".data")
        self._data = self._data_path.open("wb")
        self._entries: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._data.close()
        try:
            if kind is None:
                self._finish()
        finally:
            self._data_path.unlink()

    def add(self, name: str, tensor: Tensor) -> int:
        """Appends a tensor; returns its bytes."""
        begin = self._data.tell()
        self._data.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        end = self._data.tell()
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        return end - begin

    def _finish(self) -> None:
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        with self._path.open("wb") as file, self._data_path.open("rb") as data:
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(data, file, 1 << 20)
