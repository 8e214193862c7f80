"""BOFT in PEFT's format: an input rotated by butterfly factors, and a scale of the output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import as_integer, refuse_field
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.payloads.rotations import block_diagonal, cayley, side_by_side
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.block_rotation import InputRotation
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_scale import RowScale
from deltamux.base.structure import SiteSpec

_ROTATIONS, _SCALES = "boft_R", "boft_s"

# PEFT rotates the inputs of linear modules only, whose weights lie one way.
_HARMLESS = ("boft_dropout", "fan_in_fan_out", "init_weights")

_MAX = 1 << 20
_MAX_FACTORS = 20


class Boft(ModuleFamily):
    """All factors together are block-diagonal again, in blocks 2^(factors - 1) times as large."""

    name = "boft"
    peft_types = ("BOFT",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            number = as_integer("boft_block_num", fields.take("boft_block_num", 0), 0, _MAX)
            size = as_integer("boft_block_size", fields.take("boft_block_size", 4), 0, _MAX)
            if bool(number) == bool(size):
                wanted = f"0 if boft_block_num (here {number}) is not, and only then"
                refuse_field("boft_block_size", size, wanted)
            factors = fields.take("boft_n_butterfly_factor", 1)
            return _Boft(
                read_targets(fields, "boft_only"),
                Names((_ROTATIONS, _SCALES)),
                number,
                size,
                as_integer("boft_n_butterfly_factor", factors, 1, _MAX_FACTORS),
            )


@dataclass(frozen=True, eq=False)
class _Boft(Tuner):
    # One of the two is 0.
    block_number: int
    block_size: int
    factors: int

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        factors = given.modules.take(site.name, _ROTATIONS, 4).float()
        scale = given.modules.take(site.name, _SCALES, 2).float()
        self._check(site, factors, scale)
        yield InputRotation(side_by_side(_blocks(factors)))
        yield RowScale(scale.flatten())

    def _check(self, site: SiteSpec, factors: Tensor, scale: Tensor) -> None:
        """PEFT trains a single factor, whatever the config says, where its extension is missing."""
        size = self.block_size or site.in_features // self.block_number
        blocks = (site.in_features // max(size, 1), size, size)
        shapes = [(number, *blocks) for number in {1, self.factors}]
        fits = factors.shape in shapes and blocks[0] * size == site.in_features
        if not fits or scale.shape != (site.out_features, 1):
            raise other_base(site, f"boft_R of {tuple(factors.shape)}, {tuple(scale.shape)} scales")
        if blocks[0] % (1 << (len(factors) - 1)) or (len(factors) > 1 and size % 2):
            raise other_base(site, f"{len(factors)} butterfly factors of {blocks[0]} blocks")


def _blocks(parameters: Tensor) -> Tensor:
    """The product of all factors [factors, blocks, size, size], as larger blocks."""
    factors, number, size, _ = parameters.shape
    skew = 0.5 * (parameters - parameters.transpose(2, 3)).flatten(0, 1)
    rotations = cayley(skew).view(factors, number, size, size)
    largest = size << (factors - 1)
    product = torch.eye(largest)
    for factor, blocks in enumerate(rotations):
        diagonal = block_diagonal(blocks.view(-1, largest // size, size, size))
        place = _butterfly(largest, size << factor, size // 2)
        product = diagonal[:, place][:, :, place] @ product
    return product


def _butterfly(width: int, block: int, run: int) -> Tensor:
    """A permutation of `width`: in each block, the runs at even places before those at odd."""
    runs = torch.arange(width).view(-1, block // run, run)
    return torch.cat((runs[:, 0::2], runs[:, 1::2]), 1).flatten()
