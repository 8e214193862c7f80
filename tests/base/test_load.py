"""Loading from a folder: what is ready afterwards, and one clear line for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
)

from deltamux.base.load import adopt, load_base
from deltamux.errors import StartupError
from deltamux_kernels import native


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=77,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(*arguments: str) -> str:
    with pytest.raises(StartupError) as error:
        load_base(*arguments)
    assert "\n" not in error.value.message
    return error.value.message


def test_base_is_frozen_and_described(folder: Path) -> None:
    base = load_base(str(folder))
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert (base.device.type, base.dtype) == ("cpu", torch.float32)
    assert (base.vocab_size, base.max_model_len) == (64, 77)
    assert [layer.kv_heads for layer in base.layers] == [2, 2]
    assert base.layers[0].key_dim == base.layers[0].value_dim == 8
    assert "lm_head" in base.structure.sites


def test_dtype_is_the_one_asked_for(folder: Path) -> None:
    assert load_base(str(folder), "cpu", "bfloat16").dtype == torch.bfloat16
    assert "unknown dtype 'int8'" in refusal(str(folder), "cpu", "int8")


def test_weights_are_those_of_the_folder(folder: Path) -> None:
    base = load_base(str(folder), "cpu", "float32")
    stored = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj", "lm_head", "model.embed_tokens"):
        assert torch.equal(base.structure.weight(name), stored[name + ".weight"].float())


def test_bfloat16_weights_take_16_bits_and_give_the_logits_of_float32(folder: Path) -> None:
    base = load_base(str(folder))
    base.set_plain_attention()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in ("model.layers.0.mlp.up_proj", "lm_head"):
        packed, weight = base.model.get_submodule(name), plain.get_submodule(name).weight
        assert packed.memory[1] < weight.nbytes or not native.available()
    ids = torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(base.model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_two_bases_keep_their_attention_apart() -> None:
    first, second = adopt(tiny_llama().float()), adopt(tiny_llama().float())
    called: list[str] = []

    def attention_of(name: str):  # type: ignore[no-untyped-def]
        def attention(module, query, key, value, *_, **__):  # type: ignore[no-untyped-def]
            called.append(name)
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

        return attention

    first.set_attention(attention_of("first"))
    second.set_attention(attention_of("second"))
    first.model(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    assert called == ["first", "first"]
    first.set_plain_attention()
    first.model(torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    assert called == ["first", "first"]


def test_missing_folder(tmp_path: Path) -> None:
    assert "neither a folder nor a model" in refusal(str(tmp_path / "nothing"))


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "it has no config.json" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    assert "no_such_architecture" in refusal(str(tmp_path))


def test_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(str(tmp_path))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=77,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_an_encoder_is_ready_without_a_head(encoder: Path) -> None:
    base = load_base(str(encoder))
    assert base.encoder is not None
    assert (base.vocab_size, base.max_model_len, base.token_types) == (64, 77, 2)
    assert base.structure.head == "" and not base.structure.tied
    assert base.structure.task_heads.width == 32
    assert "bert.encoder.layer.0.attention.self.query" in base.structure.sites
    assert not [site for site in base.structure.sites if "classifier" in site or "pooler" in site]


def test_an_encoder_whose_layers_are_incomplete_is_refused(encoder: Path) -> None:
    file = encoder / "model.safetensors"
    weights = load_file(file)
    del weights["bert.encoder.layer.0.output.dense.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "bert.encoder.layer.0.output.dense.bias" in refusal(str(encoder))


def test_a_model_that_is_neither_decoder_nor_known_encoder(tmp_path: Path) -> None:
    config = DebertaV2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
    )
    DebertaV2Model(config).save_pretrained(tmp_path)
    assert refusal(str(tmp_path))


def test_incomplete_weights_are_not_filled_with_random_numbers(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in refusal(str(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    why = "layers.0.mlp.down_proj.weight has shape (32, 48), its config says (32, 40)"
    assert why in refusal(str(folder))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "shrug"}, "KeyError: 'shrug'"),
    ],
)
def test_a_config_that_transformers_stumbles_over(
    folder: Path, fields: dict[str, object], why: str
) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    assert why in refusal(str(folder))


def test_memory_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        torch.empty(1 << 58, dtype=torch.uint8)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    assert refusal(str(folder)).startswith(
        f"there is not enough memory for the weights of {folder}"
    )


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot be loaded" in refusal(str(folder))


def test_code_of_a_checkpoint_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('the code of the checkpoint was run')")
    assert refusal(str(folder))
