"""Memory for what a recorded step computes in between."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 4 << 20
# Of a tensor's first byte, as torch's own.
_ALIGNMENT = 64


class Scratch:
    """The same memory for all recorded steps, of which one runs at a time.

    Of one step no two tensors share any. It is taken as it is needed, and kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._chunks: list[Tensor] = []
        # Where the next tensor may begin: in which chunk, and at which byte.
        self._chunk = self._first = 0

    @property
    def bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def restart(self) -> None:
        """For another step."""
        self._chunk = self._first = 0

    def like(self, tensor: Tensor) -> Tensor | None:
        """One of the same dtype, sizes and strides, not filled; None where there is no room."""
        size = tensor.untyped_storage().nbytes()
        while self._chunk < len(self._chunks):
            chunk = self._chunks[self._chunk]
            if self._first + size <= chunk.nbytes:
                part = chunk[self._first : self._first + size].view(tensor.dtype)
                self._first += -(-size // _ALIGNMENT) * _ALIGNMENT
                first = int(part.storage_offset()) + int(tensor.storage_offset())
                return part.as_strided(tensor.shape, tensor.stride(), first)
            self._chunk, self._first = self._chunk + 1, 0
        if self.bytes + max(size, _CHUNK_BYTES) > self._most_bytes:
            return None
        self._chunks.append(torch.empty(max(size, _CHUNK_BYTES), dtype=torch.uint8))
        return self.like(tensor)
