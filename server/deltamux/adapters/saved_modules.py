"""PEFT's modules_to_save: modules that were trained whole, beside any family, and saved as they
are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamux.adapters import weight_tying
from deltamux.adapters.fields import Fields, unsupported
from deltamux.adapters.manifest import Manifest
from deltamux.adapters.module_tensors import PREFIX, ModuleTensors
from deltamux.adapters.norm_tensors import take_norm
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.replacement import replacement
from deltamux.adapters.strict_json import quoted
from deltamux.adapters.weight_tying import require_tied, tied_pair
from deltamux.base.structure import SiteSpec, Structure

MODULES_TO_SAVE = "modules_to_save"
_WEIGHT, _BIAS = "base weight", "base bias"


@dataclass(frozen=True, eq=False)
class SavedModules:
    """What a checkpoint brings in place of the base's own modules, and what else it holds.

    A saved module is no target: the family that owns the rest does not see it in `structure`.
    """

    payloads: Mapping[str, tuple[Payload, ...]]
    parameters: int
    manifest: Manifest
    tensors: Mapping[str, Tensor]
    structure: Structure


def take_saved_modules(
    manifest: Manifest, tensors: Mapping[str, Tensor], structure: Structure, dtype: torch.dtype
) -> SavedModules:
    """Sets the saved modules apart.

    Raises InvalidArgument where their tensors are missing or mis-shaped, FailedPrecondition where
    they are no sites of the base or do not fit it.
    """
    fields = dict(manifest.fields)
    value = fields.pop(MODULES_TO_SAVE, None) if manifest.library == "peft" else None
    names = Fields({MODULES_TO_SAVE: value}).take_names(MODULES_TO_SAVE)
    pair = tied_pair(names, structure) if fields.get(weight_tying.FIELD) is True else {}
    sites = saved_sites(names, structure) | pair
    own = {name for name in tensors if _module(name) in sites}
    modules = ModuleTensors({name: tensors[name] for name in own}, structure, {})
    payloads = {site.name: (_payload(site, modules, structure, dtype),) for site in sites.values()}
    modules.require_none_left()
    if pair:
        require_tied(*(tensors[f"{PREFIX}{name}.weight"] for name in pair))
    return SavedModules(
        payloads,
        modules.taken,
        replace(manifest, fields=fields),
        {name: tensor for name, tensor in tensors.items() if name not in own},
        structure.without(sites),
    )


def saved_sites(names: Iterable[str], structure: Structure) -> dict[str, SiteSpec]:
    """The sites in the modules that `names` mean: those whose path ends so, as PEFT matches it.

    Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a name that means no site.
    """
    found = {}
    for name in names:
        sites = [site for site in structure.sites.values() if inside(site.name, name)]
        if not sites:
            raise unsupported(f"{MODULES_TO_SAVE} with {quoted(name)}, no site of the base model,")
        found.update({site.name: site for site in sites})
    return found


def inside(module: str, name: str) -> bool:
    """Whether PEFT's `name` means the module, or one around it: their paths end so."""
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts) + 1))


def _module(tensor: str) -> str:
    return tensor.removeprefix(PREFIX).rpartition(".")[0]


def _payload(
    site: SiteSpec, modules: ModuleTensors, structure: Structure, dtype: torch.dtype
) -> Payload:
    if site.kind == "norm":
        return take_norm(site, modules, structure, (_WEIGHT, _BIAS), dtype)
    weight = modules.take(site.name, _WEIGHT, 2)
    bias = None if structure.bias(site.name) is None else modules.take(site.name, _BIAS, 1)
    return replacement(site, weight.T if site.conv1d else weight, bias, structure, dtype)
