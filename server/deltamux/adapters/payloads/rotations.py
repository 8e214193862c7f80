"""Orthogonal matrices from free parameters, and blocks of them as payloads hold them."""

from __future__ import annotations

import torch
from torch import Tensor


def skew_symmetric(upper: Tensor, size: int) -> Tensor:
    """Matrices [n, size, size] from what is above their diagonals, [n, size (size - 1) / 2]."""
    rows, columns = torch.triu_indices(size, size, 1)
    matrices = upper.new_zeros(upper.shape[0], size, size)
    matrices[:, rows, columns] = upper
    return matrices - matrices.transpose(1, 2)


def cayley(skew: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 of each skew-symmetric Q [n, size, size]; an orthogonal matrix."""
    identity = torch.eye(skew.shape[1], dtype=skew.dtype)
    rotations: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return rotations


def block_diagonal(blocks: Tensor) -> Tensor:
    """Blocks [..., n, size, size] as matrices [..., n size, n size] with zeros around them."""
    number, size = blocks.shape[-3], blocks.shape[-1]
    spread = blocks.new_zeros(*blocks.shape[:-3], number, size, number, size)
    for index in range(number):
        spread[..., index, :, index, :] = blocks[..., index, :, :]
    return spread.flatten(-4, -3).flatten(-2)


def side_by_side(blocks: Tensor) -> Tensor:
    """Blocks [n, size, size] as one matrix [size, n size]."""
    return blocks.transpose(0, 1).reshape(blocks.shape[1], -1)
