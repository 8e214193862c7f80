"""HRA in PEFT's format: the input is reflected r times, which changes the weight by rank r."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.per_module import as_rank
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec

_VECTORS = "hra_u"


class Hra(ModuleFamily):
    """W H is W plus a matrix whose rows lie in the space of the r normals of the reflections."""

    name = "hra"
    peft_types = ("HRA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, ("init_weights",)) as fields:
            return _Hra(
                read_targets(fields, "hra_only"),
                Names((_VECTORS,)),
                as_rank("r", fields.take("r", 8)),
                fields.take_bool("apply_GS"),
            )


@dataclass(frozen=True, eq=False)
class _Hra(LowRankTuner):
    rank: int
    # Whether PEFT makes the normals orthogonal before it reflects.
    orthogonal: bool

    def change(self, site: SiteSpec, given: Given) -> Factors:
        vectors = given.modules.take_shaped(site, _VECTORS, (site.in_features, self.rank))
        normals, moves = self._reflections(vectors)
        return normals.T, -given.structure.host_weight(site.name) @ moves

    def _reflections(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """N and M [in, r] with (I - 2 n_1 n_1^T) ... (I - 2 n_r n_r^T) = I - M N^T."""
        normals, moves = vectors[:, :0], vectors[:, :0]
        for vector in vectors.T:
            if self.orthogonal:
                for normal in normals.T:
                    vector = vector - (normal @ vector) * normal
            normal = vector / vector.norm()
            move = 2 * (normal - moves @ (normals.T @ normal))
            normals = torch.cat((normals, normal[:, None]), 1)
            moves = torch.cat((moves, move[:, None]), 1)
        return normals, moves
