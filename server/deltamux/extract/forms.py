"""The forms in which a changed matrix can be stored, and the change that each stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltamux.adapters.checkpoint import delta_format as words
from deltamux_kernels.sign_delta import pack_signs, unpack_signs

FormName = Literal["exact", "low-rank", "sparse", "one-bit"]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """How linear weights are stored; the rest is stored whole in every form.

    Low rank keeps `rank` directions, or as few as hold the share `energy` of the squares of all
    singular values; sparse keeps the share `share` of the numbers, the largest.
    """

    name: FormName
    rank: int | None = None
    energy: float = 0.9
    share: float = 0.05

    def parts(self, delta: Tensor, dtype: torch.dtype) -> Parts:
        """The parts of a float32 change [out, in], weights in `dtype`; none for the exact form."""
        if self.name == "low-rank":
            return _low_rank(delta, self.rank, self.energy, dtype)
        if self.name == "sparse":
            return _sparse(delta, self.share, dtype)
        return _one_bit(delta) if self.name == "one-bit" else {}


def change(parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The float32 change [out, in] that all parts of a matrix add up to."""
    total = torch.zeros(shape)
    if words.LOW_RANK_A in parts:
        total += parts[words.LOW_RANK_B].float() @ parts[words.LOW_RANK_A].float()
    if words.SPARSE_VALUES in parts:
        starts = parts[words.SPARSE_STARTS].long()
        rows = torch.arange(shape[0]).repeat_interleave(starts.diff())
        places = (rows, parts[words.SPARSE_COLUMNS].long())
        total.index_put_(places, parts[words.SPARSE_VALUES].float(), accumulate=True)
    if words.SIGNS in parts:
        total += parts[words.SIGN_SCALE] * unpack_signs(parts[words.SIGNS], shape[1])
    return total


def size_of(parts: Mapping[str, Tensor]) -> int:
    """Their bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in parts.values())


def _low_rank(delta: Tensor, rank: int | None, energy: float, dtype: torch.dtype) -> Parts:
    left, singular, right = torch.linalg.svd(delta, full_matrices=False)
    if rank is None:
        held = singular.double().square().cumsum(0)
        rank = int((held < energy * held[-1]).sum()) + 1
    rank = min(rank, singular.shape[0])
    # Either factor gets a half of the scale, so that neither is rounded worse than the other.
    root = singular[:rank].sqrt()
    return {
        words.LOW_RANK_A: (root[:, None] * right[:rank]).to(dtype),
        words.LOW_RANK_B: (left[:, :rank] * root).to(dtype),
    }


def _sparse(delta: Tensor, share: float, dtype: torch.dtype) -> Parts:
    count = max(1, round(share * delta.numel()))
    kept = torch.zeros(delta.numel(), dtype=torch.bool)
    kept[delta.abs().flatten().topk(count).indices] = True
    return sparse_parts(delta, kept.view(delta.shape), dtype)


def sparse_parts(delta: Tensor, kept: Tensor, dtype: torch.dtype) -> Parts:
    """The numbers of `delta` where `kept` [out, in] says so."""
    rows, columns = kept.nonzero(as_tuple=True)
    starts = torch.zeros(delta.shape[0] + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(rows, minlength=delta.shape[0]).cumsum(0)
    return {
        words.SPARSE_VALUES: delta[rows, columns].to(dtype),
        words.SPARSE_COLUMNS: columns.int(),
        words.SPARSE_STARTS: starts,
        words.SPARSE_SHAPE: torch.tensor(delta.shape, dtype=torch.int32),
    }


def _one_bit(delta: Tensor) -> Parts:
    """BitDelta: the signs, and the mean size, which is the scale of the least squared error."""
    return {
        words.SIGNS: pack_signs(delta > 0),
        words.SIGN_SCALE: delta.abs().mean()[None],
        words.SIGN_SHAPE: torch.tensor(delta.shape, dtype=torch.int32),
    }
