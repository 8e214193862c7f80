"""Which task heads transformers would put on a model."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from deltamux.base.encoders import encoder_of, shared_head
from deltamux.base.task_heads import HeadFormat, HeadModule, Level, TaskHeads


def find_task_heads(model: PreTrainedModel, width: int) -> TaskHeads:
    """Those of its AutoModelFor...Classification, over hidden states of this width."""
    return TaskHeads(
        width=width,
        body=model.base_model_prefix,
        formats=_formats(model),
        labels=_labels(model.config),
        problem_type=model.config.problem_type,
        pad_token_id=model.config.get_text_config().pad_token_id,
    )


def _formats(model: PreTrainedModel) -> Mapping[Level, HeadFormat]:
    encoder = encoder_of(model.config)
    if encoder is None:
        return _decoder_formats(model.config.get_text_config())
    complete = shared_head(model) is not None
    return {
        level: form
        for level, form in encoder.formats(model.config).items()
        if complete or not form.shared
    }


def _decoder_formats(config: PreTrainedConfig) -> Mapping[Level, HeadFormat]:
    biased = getattr(config, "token_classification_bias", True)
    return {
        "sequence": HeadFormat("last", (HeadModule(("score",), biased=False),)),
        "token": HeadFormat("all", (HeadModule(("score", "classifier"), biased),)),
    }


def _labels(config: PreTrainedConfig) -> tuple[str, ...]:
    names = config.id2label
    return tuple(str(names[index]) for index in sorted(names))
