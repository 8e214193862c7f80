"""Unions of AdapterHub: several methods in one adapter, mix-and-match (MAM) among them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltamux.adapters.adapterhub.keyed_tensors import require_one_form
from deltamux.adapters.adapterhub.model import model_prefix
from deltamux.adapters.checkpoint.fields import Fields, refuse_field, unsupported
from deltamux.adapters.checkpoint.manifest import Manifest, member_of_union
from deltamux.adapters.family import Family, Parsed
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.unserved import refusal
from deltamux.base.structure import Structure

# How the tensors of a method are told from those of another; what is left are a bottleneck's.
_NAMES = {
    "lora": re.compile(r"\.loras\.|shared_parameters\..*\.lora_[AB]$"),
    "mtl_lora": re.compile(r"\.loras\."),
    "prefix_tuning": re.compile(r"\bprefix_tunings\."),
}


class Union:
    """Each member reads its own config and tensors; what they add at a site is put together.

    AdapterHub lets its methods act in the order in which the primitives of a site do.
    """

    name = "union"

    def __init__(self, *members: Family) -> None:
        self._members = members

    def claims(self, manifest: Manifest) -> bool:
        return (manifest.library, manifest.type) == ("adapterhub", "union")

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        manifests = _manifests(manifest)
        require_one_form(tensors.keys(), model_prefix(structure))
        shares = _shares([member.type for member in manifests], tensors)
        parsed = [
            self._family(member).parse(member, share, structure, dtype)
            for member, share in zip(manifests, shares, strict=True)
        ]
        return _joined(parsed)

    def _family(self, manifest: Manifest) -> Family:
        for family in self._members:
            if family.claims(manifest):
                return family
        raise refusal(manifest)


def _manifests(manifest: Manifest) -> list[Manifest]:
    fields = Fields(Fields(manifest.fields).take_table("config"))
    configs = fields.take("configs")
    fields.discard(("architecture",))
    fields.require_none_left()
    if not isinstance(configs, list) or not configs:
        refuse_field("configs", configs, "a list of configs")
    members = [member_of_union(manifest, config) for config in configs]
    if len({member.type for member in members}) < len(members):
        raise unsupported("a union of several configs of one method")
    return members


def _shares(types: Sequence[str], tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each member; the first one without names of its own takes what is left."""
    rest = next((n for n, type in enumerate(types) if type not in _NAMES), 0)
    shares: list[dict[str, Tensor]] = [{} for _ in types]
    for name, tensor in tensors.items():
        owners = (n for n, type in enumerate(types) if type in _NAMES and _NAMES[type].search(name))
        shares[next(owners, rest)][name] = tensor
    return shares


def _joined(parsed: Sequence[Parsed]) -> Parsed:
    if any(member.reach is not None for member in parsed):
        raise unsupported("a member that acts on part of a prompt, in a union,")
    payloads: defaultdict[str, tuple[Payload, ...]] = defaultdict(tuple)
    for member in parsed:
        for site, of_site in member.payloads.items():
            payloads[site] += of_site
    return Parsed(
        dict(payloads),
        max(member.rank for member in parsed),
        sum(member.parameters for member in parsed),
        tuple(note for member in parsed for note in member.notes),
    )
