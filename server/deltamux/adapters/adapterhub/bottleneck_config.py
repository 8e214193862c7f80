"""Reads the adapter_config.json of a bottleneck adapter as AdapterHub writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltamux.adapters.adapterhub.model import AdapterHubConfig, take_layers, take_text
from deltamux.adapters.checkpoint.fields import (
    Fields,
    as_integer,
    as_number,
    refuse_field,
    unsupported,
)
from deltamux.adapters.checkpoint.strict_json import Json, quoted
from deltamux.adapters.primitives.bottleneck import (
    Bottleneck,
    OutputBottleneck,
    ResidualBottleneck,
    SumBottleneck,
)

_MAX_FACTOR = float(1 << 20)

# AdapterHub's names of the functions that are served; the tanh form of gelu has several.
_ACTIVATIONS = {
    "relu": "relu",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "linear",
}
# Configs without a version are from a time when these meant something else.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

# How weights were first drawn, and what only training does.
_HARMLESS = (
    "dropout",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_c_init",
    "phm_init_range",
    "stochastic_depth",
)


@dataclass(frozen=True)
class Phm:
    """How matrices are sums of Kronecker products (Compacter)."""

    dim: int
    rank: int
    bias: bool
    shared_rule: bool
    factorized_rule: bool
    shared_weight: bool
    factorized_weight: bool


@dataclass(frozen=True)
class BottleneckConfig:
    """`scaling` is a number, "learned" or "channel"; `phm` is None for plain matrices."""

    attention: bool
    mlp: bool
    left_out: frozenset[int]
    reduction: Mapping[str, float]
    activation: str
    parallel: bool
    original_ln_before: bool
    original_ln_after: bool
    residual_before_ln: Json
    ln_before: bool
    ln_after: bool
    scaling: float | str
    phm: Phm | None

    def width(self, layer: int, hidden: int) -> int:
        """Of the bottleneck in this layer. Raises InvalidArgument where the config tells none."""
        factor = self.reduction.get(str(layer), self.reduction.get("default"))
        if factor is None:
            refuse_field("reduction_factor", dict(self.reduction), f"given for layer {layer}")
        return max(1, int(hidden // factor))

    def reads(self, norms_last: bool) -> type[Bottleneck]:
        """What the bottleneck reads, in layers that norm first or last.

        Raises FailedPrecondition where the base's own residual would have to be dropped, doubled
        or normed twice.
        """
        reads_sum = self.original_ln_before and not self.parallel
        # Then the residual around the bottleneck has the layer's own in it already.
        has_residual = reads_sum and self.residual_before_ln is False
        plain = self.parallel or self.residual_before_ln in (True, False)
        if not plain or has_residual == self.original_ln_after or (has_residual and norms_last):
            raise unsupported(
                f"original_ln_before = {self.original_ln_before}, original_ln_after = "
                f"{self.original_ln_after} with residual_before_ln = {self.residual_before_ln} "
                "in this base model"
            )
        if reads_sum:
            return SumBottleneck
        return ResidualBottleneck if self.parallel else OutputBottleneck


def read_bottleneck_config(hub: AdapterHubConfig) -> BottleneckConfig:
    """Raises InvalidArgument or FailedPrecondition for a field that is not understood."""
    fields = hub.fields
    fields.require_off({"architecture": None, "cross_adapter": False, "inv_adapter": None})
    fields.require_off({"use_gating": False})
    ln_after = fields.take_bool("ln_after")
    if fields.take_bool("adapter_residual_before_ln") and ln_after:
        raise unsupported("adapter_residual_before_ln with ln_after")
    config = BottleneckConfig(
        attention=fields.take_bool("mh_adapter"),
        mlp=fields.take_bool("output_adapter"),
        left_out=take_layers(fields),
        reduction=_reduction(fields.take("reduction_factor")),
        activation=_activation(take_text(fields, "non_linearity"), hub.versioned),
        parallel=fields.take_bool("is_parallel"),
        original_ln_before=fields.take_bool("original_ln_before"),
        original_ln_after=fields.take_bool("original_ln_after", True),
        residual_before_ln=_residual_before_ln(fields),
        ln_before=fields.take_bool("ln_before"),
        ln_after=ln_after,
        scaling=_scaling(fields.take("scaling")),
        phm=_phm(fields),
    )
    fields.discard(_HARMLESS)
    fields.require_none_left()
    return config


def _reduction(value: Json) -> Mapping[str, float]:
    """One factor for all layers, or one for each of them by its number."""
    by_layer = value if isinstance(value, dict) else {"default": value}
    return {
        layer: as_number("reduction_factor", factor, _MAX_FACTOR)
        for layer, factor in by_layer.items()
    }


def _activation(name: str, versioned: bool) -> str:
    meant = name.lower() if versioned else _OLD_ACTIVATIONS.get(name, name.lower())
    if meant not in _ACTIVATIONS:
        raise unsupported(f"non_linearity = {quoted(name)}")
    return _ACTIVATIONS[meant]


def _residual_before_ln(fields: Fields) -> Json:
    value = fields.take("residual_before_ln")
    if value not in (None, True, False, "post_add"):
        refuse_field("residual_before_ln", value, 'true, false or "post_add"')
    return True if value is None else value


def _scaling(value: Json) -> float | str:
    """AdapterHub takes floats only: an integer is refused by it too."""
    if value is None:
        return 1.0
    if value not in ("learned", "channel") and not isinstance(value, float):
        refuse_field("scaling", value, 'a number with a point, "learned" or "channel"')
    return value


def _phm(fields: Fields) -> Phm | None:
    phm = Phm(
        dim=as_integer("phm_dim", _or(fields.take("phm_dim"), 4), 1, 1 << 10),
        rank=as_integer("phm_rank", _or(fields.take("phm_rank"), 1), 1, 1 << 10),
        bias=fields.take_bool("phm_bias", True),
        shared_rule=fields.take_bool("shared_phm_rule", True),
        factorized_rule=fields.take_bool("factorized_phm_rule"),
        shared_weight=fields.take_bool("shared_W_phm"),
        factorized_weight=fields.take_bool("factorized_phm_W", True),
    )
    return phm if fields.take_bool("phm_layer") else None


def _or(value: Json, default: int) -> Json:
    return default if value is None else value
