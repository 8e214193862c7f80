"""LN tuning in PEFT's format: norms with a weight and a bias of the adapter's own."""

from __future__ import annotations

from collections.abc import Iterable

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.norm_tensors import take_norm
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.payload import Payload
from deltamux.base.structure import Kind, SiteSpec

_PARTS = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")


class LnTuning(ModuleFamily):
    """PEFT copies any module that is named; only copies of norms are served."""

    name = "ln_tuning"
    peft_types = ("LN_TUNING",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, ()) as fields:
            return _LnTuning(read_targets(fields), Names(_PARTS))


class _LnTuning(Tuner):
    kinds = frozenset[Kind](("norm",))

    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        yield take_norm(site, given.modules, given.structure, _PARTS)
