"""What the engine tells the front end about a sequence: its end, its timing, its error."""

from __future__ import annotations

from deltamux.engine.sequence import Sequence
from deltamux.errors import (
    DeltamuxError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
)
from deltamux.wire.messages import FirstToken


def finish_reason(sequence: Sequence, max_model_len: int) -> str:
    """One of "stop" and "length", or "" while the sequence goes on."""
    stopping, generated = sequence.stopping, sequence.num_generated
    if generated >= stopping.min_tokens and sequence.tokens[-1] in stopping.stop_token_ids:
        return "stop"
    return "length" if is_full(sequence, generated, max_model_len) else ""


def is_full(sequence: Sequence, generated: int, max_model_len: int) -> bool:
    """Whether a sequence ends with so many generated tokens, whatever they are."""
    places = sequence.virtual.tokens + sequence.num_prompt + generated
    return generated >= sequence.stopping.max_tokens or places >= max_model_len


def admission(sequence: Sequence) -> FirstToken | None:
    """Told with a sequence's first outcome. Waiting for the adapter does not count as queueing."""
    if sequence.admitted is None:
        return None
    missed = sequence.admitted if sequence.adapter_missed is None else sequence.adapter_missed
    return FirstToken(
        queue=missed - sequence.arrival,
        adapter_load=sequence.admitted - missed,
        tier=sequence.tier,
        cached_prompt_tokens=sequence.num_cached,
    )


def adapter_error(error: DeltamuxError) -> DeltamuxError:
    """A malformed adapter is the loader's invalid argument, but not that of who generates."""
    if isinstance(error, InvalidArgument):
        return FailedPrecondition(error.message, reason=error.reason)
    return error


def non_finite_error(sequence: Sequence) -> DeltamuxError:
    """The adapter's fault where there is one: the base has passed its self-test."""
    kind = FailedPrecondition if sequence.adapter else Internal
    return kind("what the model gives is not finite", reason="NON_FINITE_OUTPUT")


def out_of_memory_error() -> DeltamuxError:
    return ResourceExhausted("there is not enough memory for it", reason="OUT_OF_MEMORY")
