"""What a request that leaves a field open gets: the model's own generation config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deltamux.errors import StartupError, first_line
from deltamux.frontend.validation import check, context_tokens, invalid
from deltamux.v1 import inference_pb2 as v1
from deltamux.wire.messages import Ready, Sampling, Stopping


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling parameters by default, and the ids that end a sequence."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    end_of_sequence: tuple[int, ...] = ()

    @classmethod
    def load(cls, model: str, tokenizer_end: int | None) -> GenerationDefaults:
        """From a model folder or hub id; `tokenizer_end` counts where the model names no id."""
        config = _generation_config(model)
        ids = _ids(config.eos_token_id) or _ids(tokenizer_end)
        # Without do_sample, generation is greedy and the other fields mean nothing.
        temperature = _or(config.temperature, 1.0) if config.do_sample else 0.0
        return cls(
            temperature=temperature,
            top_p=_or(config.top_p, cls.top_p),
            top_k=_or(config.top_k, cls.top_k),
            min_p=_or(config.min_p, cls.min_p),
            repetition_penalty=_or(config.repetition_penalty, cls.repetition_penalty),
            end_of_sequence=ids,
        )

    def sampling(self, request: v1.GenerateRequest) -> Sampling:
        """The checked parameters, with these in place of those left open."""
        given = request.sampling

        def chosen(field: str) -> float:
            return float(getattr(given if given.HasField(field) else self, field))

        return Sampling(
            temperature=chosen("temperature"),
            top_p=chosen("top_p"),
            top_k=int(chosen("top_k")),
            min_p=chosen("min_p"),
            repetition_penalty=chosen("repetition_penalty"),
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            seed=given.seed if given.HasField("seed") else None,
            logit_bias=dict(given.logit_bias),
            logprobs=request.output.logprobs if request.output.HasField("logprobs") else None,
        )

    def stopping(self, given: v1.StoppingCriteria, prompt_tokens: int, engine: Ready) -> Stopping:
        """What ends the sequence in the engine; without max_tokens, the end of the context.

        Raises InvalidArgument for more tokens than the prompt leaves room for.
        """
        room = context_tokens(engine) - prompt_tokens
        max_tokens = given.max_tokens or room
        if max_tokens > room:
            raise invalid(
                "stopping.max_tokens",
                f"{prompt_tokens} prompt tokens leave room for {room}, not {max_tokens}",
                "CONTEXT_EXCEEDED",
            )
        check(given.min_tokens <= max_tokens, "stopping.min_tokens", "exceeds max_tokens")
        ends = () if given.ignore_eos else self.end_of_sequence
        ids = tuple(dict.fromkeys((*given.stop_token_ids, *ends)))
        return Stopping(max_tokens, given.min_tokens, ids)


def _generation_config(model: str) -> Any:
    """The model's own, or what its configuration says where there is none."""
    # Takes seconds to import.
    from transformers import AutoConfig, GenerationConfig

    try:
        try:
            return GenerationConfig.from_pretrained(model)
        except OSError:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            return GenerationConfig.from_model_config(config)
    # Whatever broken files make transformers stumble over.
    except Exception as error:
        why = first_line(error)
        raise StartupError(f"cannot load the configuration of {model}: {why}") from error


def _ids(eos: int | Iterable[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
