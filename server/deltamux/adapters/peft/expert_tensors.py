"""LoRA at the experts of a mixture, which PEFT finds by the names of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

from deltamux.adapters.checkpoint.fields import unsupported
from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.adapters.checkpoint.tensors import require_finite
from deltamux.adapters.peft.module_tensors import ModuleTensors
from deltamux.adapters.primitives.expert_low_rank import ExpertLowRank
from deltamux.base.experts import PROJECTIONS, Experts
from deltamux.base.structure import SiteSpec, Structure

# What transformers 4 called the modules of a mixture, by the model whose checkpoints a base's are
# converted like. PEFT reads the same table, and takes a target of such a name for experts.
_FORMER_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class ExpertTarget:
    """One layer of a mixture, and the names of its A and B."""

    experts: Experts
    projection: str
    tensors: tuple[str, str]

    @property
    def name(self) -> str:
        return f"{self.experts.name}.{self.projection}"


def expert_targets(parameters: Iterable[str], structure: Structure) -> list[ExpertTarget]:
    """The layers that target_parameters means.

    Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a name that means none: PEFT adapts any
    parameter, a router's too.
    """
    parameters = tuple(parameters)
    names = [
        f"{mixture}.{projection}" for mixture in structure.experts for projection in PROJECTIONS
    ]
    for parameter in parameters:
        if not any(_means(parameter, name) for name in names):
            raise unsupported(f"target_parameters with {quoted(parameter)}, no layer of experts,")
    targets = []
    for mixture in structure.experts.values():
        meant = [
            projection
            for projection in PROJECTIONS
            if any(_means(parameter, f"{mixture.name}.{projection}") for parameter in parameters)
        ]
        # PEFT wraps the first parameter first, so that it lies deepest.
        for depth, projection in enumerate(reversed(meant)):
            key = f"model.{mixture.name}" + ".base_layer" * depth
            tensors = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
            targets.append(ExpertTarget(mixture, projection, tensors))
    return targets


def refuse_former_names(sites: Iterable[SiteSpec], structure: Structure) -> None:
    """Raises FailedPrecondition (UNSUPPORTED_FEATURE) for a site that PEFT leaves alone, since it
    takes its name for an expert's: those of dense layers and of experts that all tokens share."""
    likeness = _MODEL_TO_CONVERSION_PATTERN.get(structure.model_type, "")
    for site in sites:
        last = site.name.rpartition(".")[2]
        if last in _FORMER_NAMES.get(likeness, ()):
            raise unsupported(
                f"LoRA at {site.name} (on {structure.model_type!r} models PEFT takes the name "
                f"{last} for a layer of experts, and leaves this module as it is)"
            )


def take_experts(
    targets: Iterable[ExpertTarget],
    modules: ModuleTensors,
    rank_of: Callable[[str], int],
    scale_of: Callable[[str], float],
    dtype: torch.dtype,
) -> dict[str, ExpertLowRank]:
    """Payloads by the name of the parameter.

    A is stored expert by expert, B rank by rank: [experts * rank, in] and [out, rank * experts].
    """
    payloads = {}
    for target in targets:
        count, rank = target.experts.count, rank_of(target.name)
        out, width = target.experts.weight(target.projection).shape[1:]
        name_a, name_b = target.tensors
        a = modules.take_shared(name_a, (count * rank, width))
        b = modules.take_shared(name_b, (out, rank * count))
        by_expert = b.view(out, rank, count).permute(2, 1, 0) * scale_of(target.name)
        payload = ExpertLowRank.of(a.view(count, rank, width).to(dtype), by_expert.to(dtype))
        for tensor in payload.tensors:
            require_finite(f"{target.name}, scaled and in {dtype},", tensor)
        payloads[target.name] = payload
    return payloads


def _means(parameter: str, name: str) -> bool:
    return name == parameter or name.endswith(f".{parameter}")
