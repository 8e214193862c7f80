"""PEFT's modules_to_save: modules that were trained whole and are saved as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deltamux.adapters.fields import unsupported
from deltamux.adapters.module_tensors import ModuleTensors, other_base, to_serving
from deltamux.adapters.norm_tensors import take_norm
from deltamux.adapters.primitives.dense import Dense, DenseEmbedding
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.strict_json import quoted
from deltamux.base.structure import SiteSpec, Structure

_WEIGHT, _BIAS = "base weight", "base bias"


def saved_sites(names: Iterable[str], structure: Structure) -> dict[str, SiteSpec]:
    """The sites in the modules that `names` mean: those whose path ends so, as PEFT matches it.

    Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a name that means no site.
    """
    found = {}
    for name in names:
        sites = [site for site in structure.sites.values() if _inside(site.name, name)]
        if not sites:
            raise unsupported(f"modules_to_save with {quoted(name)}, no site of the base model,")
        found.update({site.name: site for site in sites})
    return found


def take_saved(
    sites: Iterable[SiteSpec], modules: ModuleTensors, structure: Structure, dtype: torch.dtype
) -> dict[str, tuple[Payload, ...]]:
    """Takes the weights and biases of these sites; each replaces the base's own."""
    return {site.name: (_payload(site, modules, structure, dtype),) for site in sites}


def _inside(site: str, name: str) -> bool:
    parts = site.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts) + 1))


def _payload(
    site: SiteSpec, modules: ModuleTensors, structure: Structure, dtype: torch.dtype
) -> Payload:
    if site.kind == "norm":
        return take_norm(site, modules, structure, (_WEIGHT, _BIAS), dtype)
    saved = modules.take(site.name, _WEIGHT, 2)
    weight = saved.T if site.conv1d else saved
    if weight.shape != structure.weight(site.name).shape:
        raise other_base(site, f"weight of {tuple(saved.shape)}")
    if site.kind == "embedding":
        scale = 1.0 if site.embed_scale is None else site.embed_scale
        return DenseEmbedding(to_serving(site, weight.float() * scale, dtype))
    return Dense(to_serving(site, weight, dtype), _bias(site, modules, structure, dtype))


def _bias(
    site: SiteSpec, modules: ModuleTensors, structure: Structure, dtype: torch.dtype
) -> Tensor | None:
    if structure.bias(site.name) is None:
        return None
    bias = modules.take(site.name, _BIAS, 1)
    if bias.shape[0] != site.out_features:
        raise other_base(site, f"bias of {tuple(bias.shape)}")
    return to_serving(site, bias, dtype)
