"""The arms of the CPU measurements compute the same: a figure of something else is no figure."""

import importlib

import pytest
import torch
from cpu.harness import CPU, Site

from deltamux_kernels import Segments

SITES = (
    ("bench_low_rank", "LowRankSite"),
    ("bench_bottleneck", "BottleneckSite"),
    ("bench_row_affine", "RowAffineSite"),
    ("bench_sparse_delta", "SparseDeltaSite"),
    ("bench_sign_delta", "SignDeltaSite"),
    ("bench_dense_delta", "DenseDeltaSite"),
    ("bench_block_rotate", "BlockRotateSite"),
    ("bench_pair_rotate", "PairRotateSite"),
)


@pytest.mark.parametrize(("module", "name"), SITES)
def test_all_arms_give_the_same(module: str, name: str) -> None:
    torch.manual_seed(0)
    kind: type[Site] = getattr(importlib.import_module(module), name)
    outputs, rows = (64, 128), 3
    site = kind(64, outputs, rows)
    x, before = torch.randn(rows, 64), [torch.randn(rows, n) for n in outputs]
    segments = Segments.build([(slot, slot, slot + 1) for slot in range(rows)], CPU)
    results = []
    for arm in kind.arms:
        ys = [y.clone() for y in before]
        with torch.inference_mode():
            getattr(site, arm)(x, ys, segments)
        if arm != "peft_with_base":  # other adapters, and the base's own product
            results.append([*ys, getattr(site, "rotated", before[0])])
    for ys in results[1:]:
        for y, expected in zip(ys, results[0], strict=True):
            assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
