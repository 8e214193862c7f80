"""The parameters of a trained norm, from whichever tensors hold them."""

from __future__ import annotations

from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.primitives.norm_parameters import NormParameters
from deltamux.base.structure import SiteSpec, Structure


def take_norm(
    site: SiteSpec, modules: ModuleTensors, structure: Structure, parts: tuple[str, str]
) -> NormParameters:
    """Takes the weight and, where the base's norm has one, the bias; `parts` names the two."""
    wanted = parts if structure.bias(site.name) is not None else parts[:1]
    vectors = [modules.take(site.name, part, 1) for part in wanted]
    for vector in vectors:
        if vector.shape[0] != site.out_features:
            raise other_base(site, f"norm parameters of {tuple(vector.shape)}")
    return NormParameters(*vectors)
