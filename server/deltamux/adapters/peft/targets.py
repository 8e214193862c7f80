"""Which sites of the base a config targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deltamux.adapters.checkpoint.fields import Fields, as_integer, refuse_field, unsupported
from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.peft.patterns import ALL_LINEAR, LayerFilter, Pattern, Selector
from deltamux.adapters.peft.per_module import PerModule
from deltamux.adapters.peft.trained_biases import Trained, read_trained_biases
from deltamux.base.structure import Kind, SiteSpec, Structure
from deltamux.errors import InvalidArgument

LINEAR: frozenset[Kind] = frozenset(("linear", "head"))
LINEAR_OR_EMBEDDING: frozenset[Kind] = LINEAR | frozenset[Kind](("embedding",))

_MAX_LAYER = 1 << 16

# What a config targets in PEFT that has nothing but modules_to_save.
_NOTHING = "dummy-target-modules"


@dataclass(frozen=True, eq=False)
class Targets:
    """The modules that a tuner changes and the biases that it trained."""

    selector: Selector
    trained_biases: Trained = "none"

    def sites(
        self, structure: Structure, tables: Iterable[PerModule[Any]], kinds: frozenset[Kind]
    ) -> list[SiteSpec]:
        """The targeted sites, in the order in which the model holds them, and norms behind.

        Every key of `tables` has to mean one of them. Raises FailedPrecondition
        (UNSUPPORTED_FEATURE) where PEFT adapts others between them.
        """
        sites = {site.name: site for site in targeted_sites(self.selector, structure, kinds)}
        for table in tables:
            table.require_used(sites)
        for name, kind in structure.registered.items():
            known = name in sites or (kind != "embedding" and structure.has_site(name))
            if not known and self.selector.selects(name, kind == "linear"):
                raise unsupported(f"an adapter of this type at {name}")
        ordered = [sites.pop(name) for name in structure.registered if name in sites]
        return ordered + list(sites.values())


def read_targets(fields: Fields, biases: str | None = None) -> Targets:
    """Takes the fields that select modules, and `bias` where the tuner has it.

    `biases` is what the tuner calls the biases of its targets alone ("vera_only").
    """
    trained: Trained = "none"
    if biases is not None:
        trained = read_trained_biases(fields.take("bias"), biases)
    return Targets(read_selector(fields), trained)


def targeted_sites(
    selector: Selector, structure: Structure, kinds: frozenset[Kind]
) -> list[SiteSpec]:
    """The sites of these kinds that are selected.

    Raises InvalidArgument (NO_TARGETS) for none, unless none is what the selector is for.
    """
    sites = [
        site
        for site in structure.sites.values()
        if site.kind in kinds and selector.selects(site.name, site.kind == "linear")
    ]
    if not sites and selector.targets != ():
        raise _no_targets()
    return sites


def largest(sites: Sequence[SiteSpec]) -> tuple[int, int]:
    """Inputs of the widest and outputs of the tallest module.

    Raises InvalidArgument (NO_TARGETS) where there is none.
    """
    if not sites:
        raise _no_targets()
    return max(site.in_features for site in sites), max(site.out_features for site in sites)


def read_selector(fields: Fields, may_be_empty: bool = False) -> Selector:
    """Takes target_modules, exclude_modules, layers_to_transform and layers_pattern.

    `may_be_empty`: the config may target no module, since it targets something else.
    """
    targets, excluded = fields.take("target_modules"), fields.take("exclude_modules")
    layers, patterns = (
        _layers(fields.take("layers_to_transform")),
        fields.take_names("layers_pattern"),
    )
    if isinstance(targets, str) and (layers or patterns):
        refuse_field("target_modules", targets, "a list where layers_to_transform is set")
    if patterns and not layers:
        refuse_field("layers_pattern", list(patterns), "missing where layers_to_transform is")
    if targets == _NOTHING or (may_be_empty and not targets):
        return Selector(targets=())
    if not targets:
        raise InvalidArgument(f"{CONFIG}: target_modules is empty", reason="NO_TARGETS")
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    return Selector(
        targets=None if all_linear else _rule("target_modules", targets),
        excluded=_rule("exclude_modules", excluded),
        layers=LayerFilter(layers, patterns) if layers else None,
    )


def _rule(name: str, value: Json) -> tuple[str, ...] | Pattern:
    if isinstance(value, str) and value:
        return Pattern(value)
    return Fields({name: value}).take_names(name)


def _layers(value: Json) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(as_integer("layers_to_transform", v, 0, _MAX_LAYER) for v in values)


def _no_targets() -> InvalidArgument:
    return InvalidArgument(
        "target_modules matches no module of the base model that takes an adapter of this type",
        reason="NO_TARGETS",
    )
