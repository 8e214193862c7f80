"""Reads adapter_config.json: strict JSON, a known type of adapter, and nothing else decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltamux.adapters.checkpoint.files import CONFIG, open_config
from deltamux.adapters.checkpoint.strict_json import Json, parse_object, quoted
from deltamux.errors import InvalidArgument

_MAX_BYTES = 64 << 10

# Who wrote the adapter.
Library = Literal["peft", "adapterhub", "deltamux"]

# The types that there are, by library: all that PEFT has written up to 0.21; AdapterHub tells the
# type inside its `config`, or nothing of it for bottlenecks.
# fmt: off
TYPES: dict[Library, frozenset[str]] = {
    "peft": frozenset((
        "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT",
        "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY",
        "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF",
        "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING",
        "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS",
        "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA",
    )),
    "adapterhub": frozenset((
        "bottleneck", "lora", "mtl_lora", "prefix_tuning", "prompt_tuning", "reft", "union",
    )),
    "deltamux": frozenset(("delta",)),
}
# fmt: on

# The field that names the type, where it is one.
_TYPE_FIELDS: dict[Library, str] = {"peft": "peft_type", "deltamux": "deltamux_type"}


@dataclass(frozen=True)
class Manifest:
    """An adapter's type in the words of the library that wrote it; all other fields are unread."""

    library: Library
    type: str
    fields: Mapping[str, Json]
    # What PEFT was told that it is for, as one of the words of `task.Task`, once that is known.
    task: str | None = None

    @property
    def peft_type(self) -> str | None:
        """The type of an adapter that PEFT wrote, None for any other."""
        return self.type if self.library == "peft" else None


def read_manifest(folder: Path) -> Manifest:
    """Raises InvalidArgument for a file that is missing, too large or not strict JSON."""
    with open_config(folder) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InvalidArgument(f"{CONFIG} has more than {_MAX_BYTES} bytes", reason="TOO_LARGE")
    fields = parse_object(data, CONFIG)
    library = _library(fields)
    if library == "adapterhub":
        return Manifest(library, _adapterhub_type(fields), fields)
    name = _TYPE_FIELDS[library]
    return Manifest(library, _known(name, fields.pop(name, None), TYPES[library]), fields)


def member_of_union(union: Manifest, config: Json) -> Manifest:
    """The manifest that one of several methods in an adapter of AdapterHub's would have alone.

    AdapterHub corrects what configs of old versions say, but not what those in a union say.
    Raises InvalidArgument for a config that is none.
    """
    if not isinstance(config, dict):
        message = f"{CONFIG}: {quoted(config)} in configs is no object"
        raise InvalidArgument(message, reason="BAD_FIELD", field="configs")
    fields = {**union.fields, "config": config, "version": "a union's"}
    return Manifest(union.library, _adapterhub_type(fields), fields, union.task)


def _adapterhub_type(fields: Mapping[str, Json]) -> str:
    config = fields["config"]
    assert isinstance(config, dict)
    return _known("architecture", config.get("architecture") or "bottleneck", TYPES["adapterhub"])


def _known(name: str, value: Json, known: frozenset[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise InvalidArgument(
            f"{CONFIG}: {name} {quoted(value)} is no known type of adapter",
            reason="UNKNOWN_TYPE",
            field=name,
        )
    return value


def _library(fields: Mapping[str, Json]) -> Library:
    """Whose config this is; PEFT's where no field tells."""
    named = [library for library, name in _TYPE_FIELDS.items() if name in fields]
    if len(named) > 1:
        names = " and ".join(_TYPE_FIELDS[library] for library in named)
        raise InvalidArgument(f"{CONFIG} has both {names}", reason="UNKNOWN_TYPE")
    if not named and isinstance(fields.get("config"), dict) and "model_type" in fields:
        return "adapterhub"
    return named[0] if named else "peft"
