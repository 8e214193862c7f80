"""BEFT in PEFT's format: a bias is added to the output of a module, whether it had one or not."""

from __future__ import annotations

from collections.abc import Iterable

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import Names
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import read_targets
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.base.structure import SiteSpec

_BIAS = "beft_bias"


class Beft(ModuleFamily):
    """What is saved is added, not put in the place of the base's bias."""

    name = "beft"
    peft_types = ("BEFT",)

    def read(self, manifest: Manifest) -> Tuner:
        with tuner_fields(manifest.fields, ("init_weights",)) as fields:
            return _Beft(read_targets(fields), Names((_BIAS,)))


class _Beft(Tuner):
    def payloads(self, site: SiteSpec, given: Given) -> Iterable[Payload]:
        bias = given.modules.take_shaped(site, _BIAS, (1, site.out_features))
        yield RowBias(bias.flatten())
