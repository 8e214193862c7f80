"""Packed matrices of one site, one behind the other in an arena of its own."""

from __future__ import annotations

import torch

from deltamux_kernels import ALIGNMENT, PackedMatrices


class Packer:
    """Writes matrices to stores of one arena of at most `elements` elements."""

    def __init__(self, elements: int) -> None:
        self.arena = torch.empty(elements)
        self._end = 0

    def write(self, store: PackedMatrices, slot: int, matrix: torch.Tensor) -> None:
        self._end = -(-self._end // ALIGNMENT) * ALIGNMENT
        store.write(slot, self._end, matrix)
        self._end += matrix.numel()

    def stored(self, matrices: list[torch.Tensor]) -> PackedMatrices:
        """A store of one matrix [any, width] a slot."""
        store = PackedMatrices(self.arena, len(matrices), matrices[0].shape[1])
        for slot, matrix in enumerate(matrices):
            self.write(store, slot, matrix)
        return store
