"""What most families come down to: payloads for each module that the config targets, and biases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.rounding import rounded
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.peft.trained_biases import take_bias_shifts
from deltamux.adapters.peft.tuner import Given, Tuner
from deltamux.adapters.primitives.dense import Dense, DenseDelta, DenseEmbedding
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.base.structure import Structure


class ModuleFamily(ABC):
    """Reads a config into a tuner, and asks it for the payloads of each module."""

    name: str
    peft_types: tuple[str, ...]

    @abstractmethod
    def read(self, manifest: Manifest) -> Tuner:
        """Raises as `parse` does."""

    def claims(self, manifest: Manifest) -> bool:
        return manifest.peft_type in self.peft_types

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        """Rounds the float32 payloads once, and adds trained biases."""
        tuner = self.read(manifest)
        sites = tuner.targets.sites(structure, tuner.tables, tuner.kinds)
        modules = ModuleTensors(tensors, structure, tuner.names_at(sites))
        given = Given(modules, structure, sites, tuner.prepare(modules, sites))
        shifts = take_bias_shifts(tuner.targets.trained_biases, sites, modules, structure)
        notes = modules.drop_base_copies()
        found = {site.name: list(tuner.payloads(site, given)) for site in sites}
        for name, shift in shifts.items():
            found.setdefault(name, []).append(RowBias(shift))
        modules.require_none_left()
        payloads = {
            name: tuple(rounded(structure.sites[name], payload, dtype) for payload in of_site)
            for name, of_site in found.items()
            if of_site
        }
        everything = [payload for of_site in payloads.values() for payload in of_site]
        rank = max((p.a.shape[0] for p in everything if isinstance(p, LowRank)), default=0)
        return Parsed(payloads, rank, modules.taken, (*notes, *_note_on_dense(everything)))


def _note_on_dense(payloads: Iterable[Payload]) -> tuple[str, ...]:
    dense = [p for p in payloads if isinstance(p, Dense | DenseDelta | DenseEmbedding)]
    if not dense:
        return ()
    size = sum(tensor.numel() * tensor.element_size() for p in dense for tensor in p.tensors)
    return (f"converted to dense matrices at {len(dense)} modules, {size} bytes",)
