"""Types of adapters that their libraries write and no family serves, and why."""

from __future__ import annotations

from collections.abc import Mapping

from deltamux.adapters.checkpoint.manifest import Library, Manifest
from deltamux.errors import FailedPrecondition

UNSERVED: Mapping[Library, Mapping[str, str]] = {
    "peft": {
        "ADAMSS": "it changes the rows of a weight in clusters that are not in the file and cannot "
        "be found again",
        "ADAPTION_PROMPT": "its prompt has a softmax of its own, behind a gate, beside that of "
        "attention, which paged attention does not compute",
        "LILY": "its router averages over all tokens of a call, so that an answer depends on what "
        "else is in the batch",
        "PSOFT": "its factors are singular vectors of the base's weight, which are not in the file "
        "and whose signs differ from machine to machine",
        "SHADOW": "it is a second transformer with a KV cache of its own beside the base",
        "XLORA": "it runs the base twice for each token, and weighs other adapters by what it saw",
    },
    "adapterhub": {
        "prompt_tuning": "AdapterHub trains prompts on encoders only, which take no virtual "
        "tokens here",
    },
    "deltamux": {},
}


def refusal(manifest: Manifest) -> FailedPrecondition:
    """Why no family claims this adapter; UNSUPPORTED_TYPE."""
    why = UNSERVED[manifest.library].get(manifest.type, "no family knows it")
    return FailedPrecondition(
        f"adapters of type {manifest.type} ({manifest.library}) are not served: {why}",
        reason="UNSUPPORTED_TYPE",
    )
