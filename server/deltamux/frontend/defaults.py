"""What a request that leaves a field open gets: the model's own generation config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deltamux.errors import StartupError


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


def _generation_config(model: str) -> Any:
    """The model's own, or what its configuration says where there is none."""
    # Takes seconds to import.
    from transformers import AutoConfig, GenerationConfig

    try:
        try:
            return GenerationConfig.from_pretrained(model)
        except OSError:
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot load the configuration of {model}: {error}") from error


def _ids(eos: int | Iterable[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
