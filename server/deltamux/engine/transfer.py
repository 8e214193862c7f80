"""Small arrays between the host and the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

# Kernels are compiled for pointers that are multiples of it, and again for others.
_ALIGNMENT = 16
_TYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


def to_device(array: Array, device: torch.device) -> Tensor:
    """The array as a tensor: its own memory on a CPU, a pinned copy under way on a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Upload:
    """The arrays of one step after another to the device, each step's in one copy.

    Their pinned memory is taken once and used again. A CPU reads the arrays themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def send(self, arrays: Items[Array]) -> list[Tensor]:
        """Tensors of the same shapes and types, int32 or int64."""
        if self.device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        pinned = self._room(sum(spans(arrays)))
        pack(arrays, pinned.numpy())
        sent = pinned.to(self.device, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()
        return unpack(sent, arrays)

    def _room(self, size: int) -> Tensor:
        """Pinned memory that no copy reads any more."""
        if self._copied is not None:
            # As a rule it is over: it came right behind a step that has landed.
            self._copied.synchronize()
        if size > len(self._pinned):
            self._pinned = torch.empty(2 * size, dtype=torch.uint8, pin_memory=True)
        return self._pinned[:size]


def spans(arrays: Items[Array]) -> list[int]:
    """In packed memory: bytes of each array, and of what lies between it and the next one."""
    return [size for array in arrays for size in (array.nbytes, -array.nbytes % _ALIGNMENT)]


def pack(arrays: Items[Array], memory: Array) -> None:
    """Copies arrays to `memory`, uint8 [sum(spans)]."""
    starts = list(accumulate(spans(arrays), initial=0))[:-1:2]
    for array, start in zip(arrays, starts, strict=True):
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)


def unpack(memory: Tensor, arrays: Items[Array]) -> list[Tensor]:
    """What `pack` made of the arrays, as views of it."""
    parts = memory.split_with_sizes(spans(arrays))[::2]
    return [
        part.view(_TYPES[array.dtype]).view(array.shape)
        for array, part in zip(arrays, parts, strict=True)
    ]


class Download:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Items[Tensor]) -> None:
        """Queues the copies; on a GPU to pinned memory."""
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrived = None
        if tensors[0].is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> list[Array]:
        """The same numbers, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [copy.numpy() for copy in self._copies]
