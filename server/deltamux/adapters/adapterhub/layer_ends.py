"""The sublayers of a base by layer, under the names that AdapterHub gives to what stands there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deltamux.adapters.adapterhub.model import ModelNames, layers
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition


@dataclass(frozen=True)
class LayerEnds:
    """One layer: its number and name, and for attention and MLP the name of what stands at its end.

    `sites` are those in which the two end.
    """

    number: int
    name: str
    attention: str
    mlp: str
    sites: tuple[SiteSpec, SiteSpec]
    norms_last: bool


def layer_ends(structure: Structure, names: ModelNames) -> Iterator[LayerEnds]:
    """The layers in order, without the prefix of the model.

    Raises FailedPrecondition where the ends of a layer's sublayers are not known.
    """
    for layer, number in layers(structure).items():
        found = [s for s in structure.sublayers.values() if s.output.startswith(f"{layer}.")]
        if len(found) != 2:
            raise FailedPrecondition(
                f"{layer} does not add attention and MLP to its residual as others do; "
                "bottleneck adapters are not served on this base model",
                reason="UNSUPPORTED_FEATURE",
            )
        name = layer.removeprefix(f"{names.model}.")
        attention, mlp = (structure.sites[sublayer.output] for sublayer in found)
        yield LayerEnds(
            number,
            name,
            f"{name}.{names.attention}",
            f"{name}.{names.mlp}",
            (attention, mlp),
            norms_last=found[0].norm is not None,
        )
