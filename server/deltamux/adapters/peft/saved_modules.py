"""PEFT's modules_to_save: modules that were trained whole, beside any family, and saved as they
are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.adapters.payloads.replacement import replacement
from deltamux.adapters.payloads.rounding import rounded
from deltamux.adapters.peft import weight_tying
from deltamux.adapters.peft.module_tensors import PREFIX, ModuleTensors, Names
from deltamux.adapters.peft.norm_tensors import take_norm
from deltamux.adapters.peft.weight_tying import require_tied, tied_pair
from deltamux.adapters.primitives.payload import Payload
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
    pair = _tied(manifest, structure)
    sites = modules_to_save(manifest, structure)
    own = {name for name in tensors if _module(name) in sites}
    modules = ModuleTensors({name: tensors[name] for name in own}, structure, Names(()))
    payloads = {site.name: _payloads(site, modules, structure, dtype) for site in sites.values()}
    modules.require_none_left()
    if pair:
        require_tied(*(tensors[f"{PREFIX}{name}.weight"] for name in pair))
    return SavedModules(
        {name: of_site for name, of_site in payloads.items() if of_site},
        modules.taken,
        replace(manifest, fields=_others(manifest)),
        {name: tensor for name, tensor in tensors.items() if name not in own},
        structure.without(sites),
    )


def modules_to_save(manifest: Manifest, structure: Structure) -> dict[str, SiteSpec]:
    """The sites that a checkpoint has whole. Raises FailedPrecondition as `saved_sites` does."""
    return saved_sites(_names(manifest), structure) | _tied(manifest, structure)


def saved_sites(names: Iterable[str], structure: Structure) -> dict[str, SiteSpec]:
    """The sites in the modules that `names` mean: those whose path ends so, as PEFT matches it.

    Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a name that means no site, and where a
    module is meant as well as one inside it, which PEFT saves and cannot load.
    """
    names = tuple(names)
    found = {}
    for name in names:
        sites = [site for site in structure.sites.values() if inside(site.name, name)]
        if not sites:
            raise unsupported(f"{MODULES_TO_SAVE} with {quoted(name)}, no site of the base model,")
        found.update({site.name: site for site in sites})
    for site in found:
        if len(meant := [path for path in _paths(site) if path.endswith(names)]) > 1:
            raise unsupported(f"{MODULES_TO_SAVE} that means {meant[0]} and {meant[1]} in it")
    return found


def inside(module: str, name: str) -> bool:
    """Whether PEFT's `name` means the module, or one around it: their paths end so."""
    return any(path.endswith(name) for path in _paths(module))


def _paths(module: str) -> list[str]:
    """The module's own path and those of all around it, from the outermost on."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _names(manifest: Manifest) -> tuple[str, ...]:
    value = manifest.fields.get(MODULES_TO_SAVE) if manifest.library == "peft" else None
    return Fields({MODULES_TO_SAVE: value}).take_names(MODULES_TO_SAVE)


def _tied(manifest: Manifest, structure: Structure) -> dict[str, SiteSpec]:
    tied = manifest.fields.get(weight_tying.FIELD) is True
    return tied_pair(_names(manifest), structure) if tied else {}


def _others(manifest: Manifest) -> dict[str, Json]:
    """The fields that are left for the family."""
    if manifest.library != "peft":
        return dict(manifest.fields)
    return {name: value for name, value in manifest.fields.items() if name != MODULES_TO_SAVE}


def _module(tensor: str) -> str:
    return tensor.removeprefix(PREFIX).rpartition(".")[0]


def _payloads(
    site: SiteSpec, modules: ModuleTensors, structure: Structure, dtype: torch.dtype
) -> tuple[Payload, ...]:
    """None for a module that came out as it went in: only the rows of added tokens were trained."""
    if site.kind == "norm":
        norm = take_norm(site, modules, structure, (_WEIGHT, _BIAS))
        return (rounded(site, norm, dtype),)
    weight = modules.take(site.name, _WEIGHT, 2)
    weight = weight.T if site.conv1d else weight
    if structure.bias(site.name) is not None:
        bias = modules.take(site.name, _BIAS, 1)
        return (replacement(site, weight, bias, structure, dtype),)
    base = structure.weight(site.name)
    if weight.shape == base.shape and torch.equal(weight.to(dtype), base.to("cpu", dtype)):
        return ()
    return (replacement(site, weight, None, structure, dtype),)
