"""What a Llama block computes from the outputs of a site, in the server's kernels or fused ones."""

from __future__ import annotations

from typing import Protocol

import torch

from deltamux_kernels.gated_silu import gated_silu_triton
from deltamux_kernels.rms_norm import rms_norm_triton
from deltamux_kernels.rotary import rotary_triton
from deltamux_kernels.write_kv import write_kv_triton
from gpu.fused import Delta, gated_silu_of_sum, residual_of_sum, rotary_of_sum
from gpu.shapes import SiteShape

BLOCK_SIZE = 16
EPSILON = 1e-5


class Consumer(Protocol):
    """Both forms give the same tensors, to the bit."""

    def plain(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of y [T, sum of N] to which everything has been added."""

    def fused(self, y: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, ...]:
        """Of y as the base's product left it, and what the adapters add."""


def consumer(site: SiteShape, rows: int, like: torch.Tensor) -> Consumer:
    """What stands behind this site, with inputs of its own for so many rows."""
    if site.name == "qkv":
        return RotaryAndPages(site, rows, like)
    if site.name == "gate_up":
        return Gate(site)
    return ResidualAndNorm(site, rows, like)


class RotaryAndPages:
    """q, k and v: queries and keys are rotated, keys and values go to pages of their own."""

    def __init__(self, site: SiteShape, rows: int, like: torch.Tensor) -> None:
        self._heads = [n // site.head for n in site.outputs]
        self._site = site
        angles = torch.randn(rows, site.head, device=like.device)
        self._angles = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
        blocks = -(-rows // BLOCK_SIZE)
        pages = like.new_zeros(2, blocks, BLOCK_SIZE, self._heads[1], site.head)
        self._caches = pages[0], pages[1]
        self._mapping = torch.arange(rows, device=like.device).flip(0)

    def plain(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = (
            part.view(1, len(y), heads, self._site.head)
            for part, heads in zip(y.split(self._site.outputs, 1), self._heads, strict=True)
        )
        angles = (angle[None] for angle in self._angles)
        query, key = rotary_triton(query.transpose(1, 2), key.transpose(1, 2), *angles)
        write_kv_triton(key[0].transpose(0, 1), value[0], *self._caches, self._mapping)
        return query[0].transpose(0, 1), *self._caches

    def fused(self, y: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, ...]:
        query = rotary_of_sum(y, self._angles, self._caches, self._mapping, delta)
        return query, *self._caches


class Gate:
    """Gate and up: SiLU of one times the other."""

    def __init__(self, site: SiteShape) -> None:
        self._site = site

    def plain(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (gated_silu_triton(*y.split(self._site.outputs, 1)),)

    def fused(self, y: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, ...]:
        return (gated_silu_of_sum(y, delta),)


class ResidualAndNorm:
    """o and down: added to the residual stream, which the next norm reads."""

    def __init__(self, site: SiteShape, rows: int, like: torch.Tensor) -> None:
        (width,) = site.outputs
        self._residual = torch.randn(rows, width).to(like)
        self._weight = torch.ones(width).to(like)

    def plain(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._normed(self._residual + y)

    def fused(self, y: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, ...]:
        return self._normed(residual_of_sum(y, self._residual, delta))

    def _normed(self, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return residual, rms_norm_triton(residual, self._weight, EPSILON)
