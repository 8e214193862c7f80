"""Inits of LoRA that take a part out of the base's weights, which PEFT then trains without it.

Such an adapter on the base's own weights is the trained product less the part taken out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.fields import Fields, refuse_field, unsupported
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition, InvalidArgument

Shift = Literal["none", "pissa", "olora", "kasa"]

# Initialisations after which the base weights are the base's own.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

_CONVERT = (
    "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
)

# By how the name of the init begins.
_LOST_SHIFTS = {
    "pissa_niter": f"its randomised SVD cannot be repeated; {_CONVERT}",
    "corda": f"what it took out of the base depends on the training data; {_CONVERT}",
    "lora_ga": f"what it took out of the base depends on the training gradients; {_CONVERT}",
    "loftq": "it was trained on quantised weights, which are not those of this base",
}


def read_shift(fields: Fields) -> Shift:
    """Takes init_lora_weights, kasa_config and loftq_config.

    Raises FailedPrecondition (UNSUPPORTED_FEATURE) for an init whose part is not known.
    """
    shift = _shift_of(fields.take("init_lora_weights"))
    kasa = fields.take("kasa_config")
    fields.require_off({"loftq_config": None})
    if kasa is None:
        return shift
    if not isinstance(kasa, dict) or kasa.keys() - {"beta", "gamma"}:
        refuse_field("kasa_config", kasa, "an object of beta and gamma")
    if shift != "none":
        raise unsupported(f"kasa_config beside init_lora_weights = {quoted(shift)}")
    return "kasa"


def part_taken_out(
    shift: Shift, site: SiteSpec, structure: Structure, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """a [rank, in] and b [out, rank], float32 on the host: b a was taken out of the weight.

    Raises FailedPrecondition where the weight is another module's too, which then changed with it.
    """
    _require_own_weight(site, structure)
    if rank > min(site.in_features, site.out_features) - (shift == "kasa"):
        message = f"{site.name}: the weight has no {rank} singular values for {shift} to take out"
        raise InvalidArgument(message, reason="RANK_MISMATCH")
    if site.conv1d and shift != "pissa":
        raise unsupported(f"{shift} at {site.name}, a transposed module,")
    weight = structure.weight(site.name).detach().float()
    if shift == "olora":
        q, r = torch.linalg.qr(weight)
        a, b = r[:rank], scale * q[:, :rank]
    else:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        kept = slice(rank) if shift == "pissa" else slice(len(s) - rank, None)
        a, b = v[kept], u[:, kept] * s[kept]
    return a.cpu(), b.cpu()


def _shift_of(init: Json) -> Shift:
    if init is None or isinstance(init, bool):
        return "none"
    if isinstance(init, str):
        if init.lower() in _PLAIN_INITS:
            return "none"
        if init == "pissa":
            return "pissa"
        if init.lower() == "olora":
            return "olora"
        for name, why in _LOST_SHIFTS.items():
            if init.startswith(name):
                raise unsupported(f"init_lora_weights = {quoted(init)} ({why})")
    raise unsupported(f"init_lora_weights = {quoted(init)} (it may shift the base weights)")


def _require_own_weight(site: SiteSpec, structure: Structure) -> None:
    pair = (structure.embedding, structure.head)
    if structure.tied and site.name in pair:
        other = pair[pair[0] == site.name]
        raise FailedPrecondition(
            f"{site.name} shares its weight with {other}, whose answers the init changed too; "
            "that is not served",
            reason="UNSUPPORTED_FEATURE",
        )
