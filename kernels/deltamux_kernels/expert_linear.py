"""The linear layer of each pair's expert."""

from __future__ import annotations

import torch
from torch.nn import functional

from deltamux_kernels._triton import capability
from deltamux_kernels.expert_pairs import ExpertPairs

# From so many rows on, a product on a CPU computes a row the same way beside any others.
_LEAST_ROWS = 4


def is_one_launch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all experts' products are one launch of torch's, and the host reads nothing for it.

    So it is for bfloat16 on sm_90 and sm_100. Elsewhere torch reads how many rows each expert has,
    and multiplies expert by expert.
    """
    return dtype == torch.bfloat16 and capability(device)[0] in (9, 10)


def expert_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pairs: ExpertPairs
) -> torch.Tensor:
    """y[p, n] = sum_k x[p, k] W_e[n, k] + b_e[n], e the expert of pair p.

    x [P, K]; weight [experts, N, K], of any strides; bias [experts, N] -> [P, N].
    """
    form = expert_linear_cuda if x.is_cuda else expert_linear_torch
    return form(x, weight, bias, pairs)


def expert_linear_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pairs: ExpertPairs
) -> torch.Tensor:
    """`expert_linear` as a product for each expert."""
    y, start = x.new_empty(x.shape[0], weight.shape[1]), 0
    for expert, end in enumerate(pairs.ends.tolist()):
        if start < end:
            rows = functional.pad(x[start:end], (0, 0, 0, max(0, _LEAST_ROWS - end + start)))
            own = None if bias is None else bias[expert]
            y[start:end] = functional.linear(rows, weight[expert], own)[: end - start]
        start = end
    return y


def expert_linear_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pairs: ExpertPairs
) -> torch.Tensor:
    """`expert_linear` as one grouped product; see `is_one_launch`."""
    y = functional.grouped_mm(x, weight.transpose(1, 2), offs=pairs.ends)
    return y if bias is None else y.add_(bias[pairs.experts])
