"""Defaults as the model's files have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltamux.errors import StartupError
from deltamux.frontend.defaults import GenerationDefaults


def write(folder: Path, **fields: object) -> str:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return str(folder)


def test_a_model_that_samples(tmp_path: Path) -> None:
    model = write(
        tmp_path, do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[7, 9]
    )
    assert GenerationDefaults.load(model, tokenizer_end=1) == GenerationDefaults(
        temperature=0.6, top_p=0.95, top_k=20, end_of_sequence=(7, 9)
    )


def test_a_model_that_samples_and_names_no_temperature(tmp_path: Path) -> None:
    assert GenerationDefaults.load(write(tmp_path, do_sample=True), None).temperature == 1.0


def test_a_model_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    model = write(tmp_path, temperature=0.6, repetition_penalty=1.1)
    defaults = GenerationDefaults.load(model, tokenizer_end=1)
    assert defaults == GenerationDefaults(repetition_penalty=1.1, end_of_sequence=(1,))


def test_a_model_without_a_generation_config(tmp_path: Path) -> None:
    config = {"model_type": "llama", "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert GenerationDefaults.load(str(tmp_path), None).end_of_sequence == (5,)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot load the configuration"):
        GenerationDefaults.load(str(tmp_path), None)


def test_a_config_that_transformers_stumbles_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    with pytest.raises(StartupError, match=r"cannot load the configuration .*: ZeroDivisionError"):
        GenerationDefaults.load(str(tmp_path), None)


def test_a_generation_config_that_transformers_refuses(tmp_path: Path) -> None:
    model = write(tmp_path, max_new_tokens=0)
    with pytest.raises(StartupError, match="`max_new_tokens` must be greater than 0"):
        GenerationDefaults.load(model, None)
