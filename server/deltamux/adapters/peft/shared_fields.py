"""The fields that every PEFT config has beside its own: where it comes from, and no code to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from deltamux.adapters.checkpoint.fields import Fields
from deltamux.adapters.checkpoint.files import CONFIG
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.errors import InvalidArgument

# They do not change what an adapter computes.
PROVENANCE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")


@contextmanager
def tuner_fields(values: Mapping[str, Json], harmless: Iterable[str]) -> Iterator[Fields]:
    """The fields of a tuner's own, to be taken in the block; after it none may be left.

    `harmless` are those that do not change what an adapter computes.
    """
    fields = Fields(values)
    refuse_executable(fields)
    yield fields
    fields.discard((*PROVENANCE, *harmless))
    fields.require_none_left()


def refuse_executable(fields: Fields) -> None:
    """Raises InvalidArgument (EXECUTABLE_FIELD) for a field that names code to import."""
    mapping = fields.take("auto_mapping")
    names_transformers = isinstance(mapping, dict) and str(
        mapping.get("parent_library", "")
    ).startswith("transformers.models.")
    # PEFT writes the base's own class where no task was given; only that is harmless.
    suspects = {
        "auto_mapping": None if names_transformers else mapping,
        "megatron_config": fields.take("megatron_config"),
        "megatron_core": fields.take("megatron_core"),
        "trust_remote_code": fields.take("trust_remote_code"),
    }
    for name, value in suspects.items():
        if value not in (None, False, "megatron.core"):
            raise InvalidArgument(
                f"{CONFIG}: {name} names code to run and is refused",
                reason="EXECUTABLE_FIELD",
                field=name,
            )
