"""VeRA and PVeRA in PEFT's format: one frozen random A and B for all modules, scaled in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.payloads.low_rank_delta import Factors
from deltamux.adapters.peft.module_family import ModuleFamily
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.per_module import as_rank
from deltamux.adapters.peft.seeds import as_kept, as_seed, kaiming_uniform
from deltamux.adapters.peft.shared_fields import tuner_fields
from deltamux.adapters.peft.targets import largest, read_targets
from deltamux.adapters.peft.tuner import Given, LowRankTuner, Tuner
from deltamux.base.structure import SiteSpec


class Vera(ModuleFamily):
    """y += d_b (B d_a (A x)); modules smaller than A and B use their first columns and rows.

    PVeRA's A has r rows more, for the variance of samples that are drawn in training only.
    """

    name = "vera"
    peft_types = ("VERA", "PVERA")

    def read(self, manifest: Manifest) -> Tuner:
        name = manifest.type.lower()
        harmless = ("d_initial", "fan_in_fan_out", "generator_seed", "init_weights")
        with tuner_fields(manifest.fields, (*harmless, f"{name}_dropout")) as fields:
            if fields.take_bool("sample_at_inference"):
                raise unsupported("sample_at_inference, with random answers,")
            rank = as_rank("r", fields.take("r"))
            shared = (f"{name}_A", f"{name}_B") if fields.take_bool("save_projection", True) else ()
            return _Vera(
                read_targets(fields, f"{name}_only"),
                Names((f"{name}_lambda_b", f"{name}_lambda_d"), shared=shared),
                rank,
                2 * rank if name == "pvera" else rank,
                as_seed("projection_prng_key", fields.take("projection_prng_key")),
            )


@dataclass(frozen=True, eq=False)
class _Vera(LowRankTuner):
    rank: int
    rows_of_a: int
    seed: int

    def prepare(self, modules: ModuleTensors, sites: Sequence[SiteSpec]) -> Sequence[Tensor]:
        """A and B, as wide and as tall as the largest module asks for."""
        widest, tallest = largest(sites)
        shapes = ((self.rows_of_a, widest), (tallest, self.rank))
        if not self.names.shared:
            return kaiming_uniform(shapes, self.seed)
        names = zip(self.names.shared, shapes, strict=True)
        return [modules.take_shared(name, shape, trained=False) for name, shape in names]

    def change(self, site: SiteSpec, given: Given) -> Factors:
        name_b, name_a = self.names.parts
        scale_b = given.modules.take_shaped(site, name_b, (site.out_features,))
        scale_a = given.modules.take_shaped(site, name_a, (self.rows_of_a,))
        a, b = given.shared
        if not self.names.shared:
            a, b = (as_kept(drawn, site, given.structure) for drawn in (a, b))
        a = scale_a[:, None] * a[:, : site.in_features]
        return a[: self.rank], scale_b[:, None] * b[: site.out_features]
