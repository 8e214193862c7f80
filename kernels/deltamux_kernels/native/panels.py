"""Products of rows with a matrix that stays, in C: for its rows the matrix is laid out anew."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltamux_kernels.native.library import INTEGER, POINTER, function


class Panels:
    """A matrix [N, K] as it is read: [N / P, K, P], P columns of the result side by side.

    float32, on a CPU; P is what the machine's registers hold. Behind the last of N are zeros. Where
    all numbers are those of bfloat16, they lie in 16 bits each, with no bit of a product changed.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        """`bias` [N]."""
        self.columns, depth = matrix.shape
        panel = function("panel_columns", result=INTEGER)()
        behind = -self.columns % panel
        panels = pad(matrix.detach(), (0, 0, 0, behind)).view(-1, panel, depth)
        words = _pairs(panels) if _are_bfloat16(panels) else panels
        self._words = words.transpose(1, 2).contiguous()
        added = matrix.new_zeros(self.columns) if bias is None else bias.detach()
        self._bias = pad(added, (0, behind))
        self._multiply = function(
            "multiply",
            *(POINTER, INTEGER),  # x, how many rows
            *(POINTER, INTEGER),  # the panels, words in a k of one
            *(INTEGER, POINTER),  # K, bias
            *(POINTER, INTEGER),  # y, N
            *(POINTER, INTEGER),  # what is fetched meanwhile: see ahead.py
        )

    def product(self, x: Tensor) -> Tensor:
        """y[..., n] = bias[n] + sum_k x[..., k] matrix[n, k], summed in the order of k.

        x [..., K] -> [..., N]. The bits of a row depend on nothing beside it.
        """
        depth, words = self._words.shape[1:]
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.columns)
        self._multiply(
            x.data_ptr(),
            x.numel() // depth,
            self._words.data_ptr(),
            words,
            depth,
            self._bias.data_ptr(),
            y.data_ptr(),
            self.columns,
            None,
            0,
        )
        return y

    @property
    def memory(self) -> tuple[int, int]:
        """Where it lies, and how many bytes it takes."""
        return self._words.data_ptr(), self._words.nbytes

    def matrix(self) -> Tensor:
        """The matrix [N, K] as it was, in new memory."""
        words = self._words.transpose(1, 2)
        panels = words if words.is_floating_point() else _unpaired(words)
        return panels.flatten(0, 1)[: self.columns].contiguous()


def _are_bfloat16(numbers: Tensor) -> bool:
    """Whether the lower 16 bits of all float32 numbers are zero."""
    return not (numbers.view(torch.int32) & 0xFFFF).any()


def _pairs(panels: Tensor) -> Tensor:
    """[..., P, K] float32 -> [..., P / 2, K] int32; its lower bits are the first half of P."""
    first, second = panels.view(torch.int32).chunk(2, dim=-2)
    return first >> 16 & 0xFFFF | second


def _unpaired(pairs: Tensor) -> Tensor:
    """[..., P / 2, K] int32 -> [..., P, K] float32, the way back."""
    return torch.cat((pairs << 16, pairs & ~0xFFFF), dim=-2).view(torch.float32)
