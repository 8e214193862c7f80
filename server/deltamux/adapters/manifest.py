"""Reads adapter_config.json: strict JSON, a known peft_type, and nothing else decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltamux.adapters.files import CONFIG, open_config
from deltamux.adapters.strict_json import Json, parse_object, quoted
from deltamux.errors import InvalidArgument

_MAX_BYTES = 64 << 10

# Every type that PEFT has written up to 0.21; a name outside is no PEFT adapter at all.
# fmt: off
_PEFT_TYPES = frozenset((
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT",
    "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY",
    "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF",
    "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING", "RANDLORA",
    "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA",
    "VERA", "WAVEFT", "XLORA",
))
# fmt: on


@dataclass(frozen=True)
class Manifest:
    """`peft_type` and all other fields of the file, unread."""

    peft_type: str
    fields: Mapping[str, Json]


def read_manifest(folder: Path) -> Manifest:
    """Raises InvalidArgument for a file that is missing, too large or not strict JSON."""
    with open_config(folder) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InvalidArgument(f"{CONFIG} has more than {_MAX_BYTES} bytes", reason="TOO_LARGE")
    fields = parse_object(data, CONFIG)
    peft_type = fields.pop("peft_type", None)
    if not isinstance(peft_type, str) or peft_type not in _PEFT_TYPES:
        raise InvalidArgument(
            f"{CONFIG}: peft_type {quoted(peft_type)} is no type of adapter that PEFT knows",
            reason="UNKNOWN_TYPE",
            field="peft_type",
        )
    return Manifest(peft_type, fields)
