"""Which sites of the base a config targets."""

from __future__ import annotations

from deltamux.adapters.fields import Fields, as_integer, refuse_field
from deltamux.adapters.files import CONFIG
from deltamux.adapters.patterns import ALL_LINEAR, LayerFilter, Pattern, Selector
from deltamux.adapters.strict_json import Json
from deltamux.base.structure import Kind, SiteSpec, Structure
from deltamux.errors import InvalidArgument

_MAX_LAYER = 1 << 16

# What a config targets in PEFT that has nothing but modules_to_save.
_NOTHING = "dummy-target-modules"


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
        raise InvalidArgument(
            "target_modules matches no module of the base model", reason="NO_TARGETS"
        )
    return sites


def read_selector(fields: Fields) -> Selector:
    """Takes target_modules, exclude_modules, layers_to_transform and layers_pattern."""
    targets, excluded = fields.take("target_modules"), fields.take("exclude_modules")
    layers, patterns = (
        _layers(fields.take("layers_to_transform")),
        fields.take_names("layers_pattern"),
    )
    if isinstance(targets, str) and (layers or patterns):
        refuse_field("target_modules", targets, "a list where layers_to_transform is set")
    if patterns and not layers:
        refuse_field("layers_pattern", list(patterns), "missing where layers_to_transform is")
    if not targets:
        raise InvalidArgument(f"{CONFIG}: target_modules is empty", reason="NO_TARGETS")
    if targets == _NOTHING:
        return Selector(targets=())
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
