"""Trained biases (BitFit): PEFT saves them whole, in place of the base's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from deltamux.adapters.checkpoint.fields import refuse_field
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.payloads.base_fit import other_base
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.base.structure import SiteSpec, Structure

# PEFT's `bias`: whether the biases of no module were trained, of all, or of the targets only.
Trained = Literal["none", "all", "targets"]


def read_trained_biases(value: Json, targets_only: str) -> Trained:
    """Reads the field `bias`; `targets_only` is what the family calls it ("lora_only")."""
    if value in (None, "none"):
        return "none"
    if value == "all":
        return "all"
    if value != targets_only:
        refuse_field("bias", value, f'"none", "all" or "{targets_only}"')
    return "targets"


def take_bias_shifts(
    trained: Trained, targets: Iterable[SiteSpec], modules: ModuleTensors, structure: Structure
) -> dict[str, Tensor]:
    """Trained bias less the base's, float32 [out], of each site where they differ."""
    sites = () if trained == "none" else targets
    if trained == "all":
        sites = structure.sites.values()
    shifts = {}
    for site in sites:
        base = structure.host_bias(site.name)
        if base is None:
            continue
        bias = modules.take(site.name, "base bias", 1)
        if bias.shape != base.shape:
            raise other_base(site, f"bias of {tuple(bias.shape)}")
        shift = bias.float() - base
        if shift.any():
            shifts[site.name] = shift
    return shifts
