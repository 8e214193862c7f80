"""Cayley's transform and blocks against their definitions."""

from __future__ import annotations

import torch

from deltamux.adapters.payloads.rotations import (
    block_diagonal,
    cayley,
    side_by_side,
    skew_symmetric,
)


def test_a_skew_symmetric_matrix_becomes_a_rotation() -> None:
    torch.manual_seed(0)
    skew = skew_symmetric(torch.randn(3, 10), 5)
    assert torch.equal(skew, -skew.transpose(1, 2))
    assert torch.equal(skew[1].triu(1)[skew[1].triu(1) != 0], skew[1][*torch.triu_indices(5, 5, 1)])
    rotations = cayley(skew)
    identity = torch.eye(5).expand(3, 5, 5)
    torch.testing.assert_close(rotations @ rotations.transpose(1, 2), identity)
    torch.testing.assert_close(rotations @ (identity + skew), identity - skew)


def test_blocks_lie_on_the_diagonal_or_side_by_side() -> None:
    blocks = torch.randn(2, 3, 4, 4)
    for matrix, group in zip(block_diagonal(blocks), blocks, strict=True):
        assert torch.equal(matrix, torch.block_diag(*group))
    assert torch.equal(side_by_side(blocks[0]), torch.cat(list(blocks[0]), dim=1))
