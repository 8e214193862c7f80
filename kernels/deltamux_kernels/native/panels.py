"""Products of rows with a matrix that stays, in C: for its rows the matrix is laid out anew."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from deltamux_kernels.native.library import INTEGER, POINTER, function


class Panels:
    """A matrix [N, K] as it is read: [N / P, K, P], P columns of the result side by side.

    float32, on a CPU; P is what the machine's registers hold. Behind the last of N are zeros.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        """`bias` [N]."""
        self.columns, depth = matrix.shape
        panel = function("panel_columns", result=INTEGER)()
        behind = -self.columns % panel
        whole = pad(matrix.detach(), (0, 0, 0, behind))
        self._numbers = whole.view(-1, panel, depth).transpose(1, 2).contiguous()
        added = matrix.new_zeros(self.columns) if bias is None else bias.detach()
        self._bias = pad(added, (0, behind))
        self._multiply = function(
            "multiply",
            *(POINTER, INTEGER),  # x, how many rows
            *(POINTER, INTEGER, POINTER),  # the panels, K, bias
            *(POINTER, INTEGER),  # y, N
        )

    def product(self, x: Tensor) -> Tensor:
        """y[..., n] = bias[n] + sum_k x[..., k] matrix[n, k], summed in the order of k.

        x [..., K] -> [..., N]. The bits of a row depend on nothing beside it.
        """
        depth = self._numbers.shape[1]
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.columns)
        self._multiply(
            x.data_ptr(),
            x.numel() // depth,
            self._numbers.data_ptr(),
            depth,
            self._bias.data_ptr(),
            y.data_ptr(),
            self.columns,
        )
        return y

    @property
    def memory(self) -> tuple[int, int]:
        """Where it lies, and how many bytes it takes."""
        return self._numbers.data_ptr(), self._numbers.nbytes

    def matrix(self) -> Tensor:
        """The matrix [N, K] as it was, in new memory."""
        return self._numbers.transpose(1, 2).flatten(0, 1)[: self.columns].contiguous()
