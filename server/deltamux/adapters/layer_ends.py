"""The sublayers of a base by layer, under the names that AdapterHub gives to what stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from deltamux.adapters.strict_json import quoted
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition

_LAYER = re.compile(r"(.*?\.(\d+))\.")


@dataclass(frozen=True)
class _Names:
    """Of the model inside one with a head, and of what follows attention and MLP in a layer."""

    model: str
    attention: str = "attention_adapters"
    mlp: str = "output_adapters"


_NAMES = {
    "llama": _Names("model"),
    "mistral": _Names("model"),
    "gpt2": _Names("transformer"),
    "bert": _Names("bert", "attention.output", "output"),
    "roberta": _Names("roberta", "attention.output", "output"),
    "distilbert": _Names("distilbert"),
}


@dataclass(frozen=True)
class LayerEnds:
    """One layer: its number, and for attention and MLP the name of what stands at its end.

    `sites` are those in which the two end.
    """

    number: int
    attention: str
    mlp: str
    sites: tuple[SiteSpec, SiteSpec]
    norms_last: bool


def model_prefix(structure: Structure, model_type: str) -> str:
    """What a name may begin with. Raises FailedPrecondition (BASE_MISMATCH) for another base."""
    if model_type != structure.model_type:
        raise FailedPrecondition(
            f"the adapter was trained on a {quoted(model_type)} model, "
            f"this base is {structure.model_type!r}",
            reason="BASE_MISMATCH",
        )
    if model_type not in _NAMES:
        raise FailedPrecondition(
            f"adapters of AdapterHub are not served on {model_type!r} models",
            reason="UNSUPPORTED_FEATURE",
        )
    return _NAMES[model_type].model


def layer_ends(structure: Structure) -> Iterator[LayerEnds]:
    """The layers in order, without the prefix of the model.

    Raises FailedPrecondition where the ends of a layer's sublayers are not known.
    """
    names = _NAMES[structure.model_type]
    for layer, number in _layers(structure).items():
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
            f"{name}.{names.attention}",
            f"{name}.{names.mlp}",
            (attention, mlp),
            norms_last=found[0].norm is not None,
        )


def _layers(structure: Structure) -> dict[str, int]:
    matches = (_LAYER.match(site) for site in structure.sites)
    return {match[1]: int(match[2]) for match in matches if match}
