"""HiRA in PEFT's format: each number of a weight is scaled by that of a low-rank matrix."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import LINEAR_OR_EMBEDDING, read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.dense import DenseDelta, DenseEmbedding
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import SiteSpec

_A, _B = "hira_A", "hira_B"
_EMBEDDING_A, _EMBEDDING_B = "hira_embedding_A", "hira_embedding_B"

# How factors were first drawn; the base and the tensors show the others.
_HARMLESS = ("fan_in_fan_out", "hira_dropout", "init_weights", "r", "rank_pattern")


class Hira(ModuleFamily):
    """Served as the dense change of the weight; an embedding as a table of its own."""

    name = "hira"
    peft_types = ("HIRA",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, _HARMLESS) as fields:
            return _Hira(read_targets(fields), Names((_A, _B, _EMBEDDING_A, _EMBEDDING_B)))


class _Hira(Tuner):
    kinds = LINEAR_OR_EMBEDDING

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        weight = given.structure.host_weight(site.name)
        if site.kind != "embedding":
            yield DenseDelta(weight * _factor(site, given.modules, (_A, _B)))
            return
        factor = _factor(site, given.modules, (_EMBEDDING_A, _EMBEDDING_B))
        # PEFT adds the change to what the embedding gives, behind the base's scale.
        yield DenseEmbedding(weight * (site.embed_scale + factor.T))


def _factor(site: SiteSpec, modules: ModuleTensors, parts: tuple[str, str]) -> Tensor:
    """The low-rank matrix [out, in]."""
    a = modules.take(site.name, parts[0], 2).float()
    if a.shape[1] != site.in_features:
        raise other_base(site, f"{parts[0]} of {tuple(a.shape)}")
    return modules.take_shaped(site, parts[1], (site.out_features, a.shape[0])) @ a
