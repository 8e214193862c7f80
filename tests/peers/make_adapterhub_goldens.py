"""Makes tiny bases and bottleneck adapters with AdapterHub, and keeps what AdapterHub answers.

    python -m venv /tmp/adapterhub
    /tmp/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0
    /tmp/adapterhub/bin/python tests/peers/make_adapterhub_goldens.py tests/peers/adapterhub

`adapters` 1.3.0 needs transformers 4.57.6, which cannot live beside the transformers that deltamux
drives; so the answers are kept as files. The folder gets, for each base, its config and weights,
the adapters as `save_adapter` writes them, and `logits.safetensors`: the logits of `ids` without an
adapter and with each one alone. Beside them are, in `hidden.safetensors`, the last hidden states of
a bert that encodes, with the same weights and adapters. All weights are random, rounded to 16 bits
so that they take half the room, and computed with in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_CAUSAL_BERT = {**_SMALL, "is_decoder": True, "position_embedding_type": "absolute"}

BASES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_GROUPED)),
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**_GROUPED, sliding_window=4),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ),
    "bert": (transformers.BertLMHeadModel, transformers.BertConfig(**_CAUSAL_BERT)),
    "roberta": (
        transformers.RobertaForCausalLM,
        transformers.RobertaConfig(**_CAUSAL_BERT, pad_token_id=0),
    ),
}

_EVERYWHERE = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor={"0": 4, "default": 16}),
    "parallel": adapters.ParBnConfig(reduction_factor=2),
}
_LORA = {
    "lora": adapters.LoRAConfig(
        r=3,
        alpha=6,
        attn_matrices=["q", "k", "v"],
        intermediate_lora=True,
        output_lora=True,
        leave_out=[0],
    ),
    "ia3": adapters.IA3Config(output_lora=True, alpha=2),
}
_DORA = adapters.DoRAConfig(r=3, alpha=6, intermediate_lora=True, output_lora=True)
_MTL_LORA = adapters.MTLLoRAConfig(r=3, alpha=6, n_up_projection=2, output_lora=True)
_PREFIX = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6)
_PREFIXES = {
    "prefix": _PREFIX,
    "flat_prefix": adapters.PrefixTuningConfig(prefix_length=5, flat=True),
}
_MAM = adapters.MAMConfig(_PREFIX, adapters.ParBnConfig(reduction_factor=8))
_UNION = adapters.ConfigUnion(
    adapters.LoRAConfig(r=3, alpha=6, intermediate_lora=True),
    adapters.DoubleSeqBnConfig(reduction_factor=8),
)
_REFT = {
    "loreft": adapters.LoReftConfig(r=3),
    "tied_loreft": adapters.LoReftConfig(r=2, prefix_positions=5, tied_weights=True, layers=[1]),
}
RECIPES: dict[str, dict[str, adapters.AdapterConfig]] = {
    "llama": {
        **_EVERYWHERE,
        "scaled_parallel": adapters.ParBnConfig(
            reduction_factor=4, scaling="learned", non_linearity="tanh"
        ),
        "adapter_plus": adapters.AdapterPlusConfig(
            reduction_factor=4, non_linearity="gelu_new", stochastic_depth=0.0
        ),
        "compacter": adapters.CompacterConfig(reduction_factor=4),
        "compacter_plus": adapters.CompacterPlusPlusConfig(reduction_factor=8, phm_rank=2),
        "own_phm_rules": adapters.CompacterPlusPlusConfig(
            reduction_factor=8,
            shared_phm_rule=False,
            factorized_phm_rule=True,
            factorized_phm_W=False,
            phm_dim=2,
        ),
        "shared_phm_weights": adapters.CompacterConfig(
            reduction_factor=8,
            shared_W_phm=True,
            factorized_phm_rule=True,
            phm_bias=False,
            non_linearity="sigmoid",
        ),
        "some_layers": adapters.DoubleSeqBnConfig(leave_out=[0], non_linearity="leakyrelu"),
        "normed": adapters.DoubleSeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True),
        "with_head": adapters.SeqBnConfig(reduction_factor=16),
        "normed_after": adapters.ParBnConfig(
            reduction_factor=8, ln_after=True, non_linearity="linear"
        ),
        **_LORA,
        "dora": _DORA,
        "vera": adapters.VeraConfig(r=3, alpha=6, attn_matrices=["q"], vera_b=0.1),
        "mtl_lora": _MTL_LORA,
        **_PREFIXES,
        "mam": _MAM,
        "lora_and_houlsby": _UNION,
        **_REFT,
    },
    "mistral": _EVERYWHERE,
    "gpt2": {**_EVERYWHERE, **_PREFIXES, "mam": _MAM, **_REFT},
    "bert": {
        **_EVERYWHERE,
        "compacter": adapters.CompacterConfig(reduction_factor=4),
        **_LORA,
        "dora": _DORA,
        "vera": adapters.VeraConfig(r=3, alpha=6, vera_b=0.1),
        "mtl_lora": _MTL_LORA,
        "lora_and_houlsby": _UNION,
    },
    "roberta": {"houlsby": _EVERYWHERE["houlsby"], "pfeiffer": _EVERYWHERE["pfeiffer"]},
}
# AdapterHub's default, and the only way for `normed`, whose norm has two names, and for prefixes.
_PICKLED = {"normed", "with_head", "prefix", "flat_prefix", "mam"}


def main(folder: Path) -> None:
    for name, (model_class, config) in BASES.items():
        torch.manual_seed(0)
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        _draw(model.named_parameters(), 0.1)
        base = folder / name
        base.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(base)
        state = model.state_dict().items()
        tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
        save_file(
            {key: value.half().clone() for key, value in state if key not in tied},
            base / "model.safetensors",
        )
        answers = _answers(model, base, RECIPES[name])
        save_file(dict(answers), base / "logits.safetensors")
    bert = folder / "bert"
    save_file(dict(_hidden_states(bert, [*RECIPES["bert"]])), bert / "hidden.safetensors")


def _answers(
    model: transformers.PreTrainedModel, base: Path, recipes: dict[str, adapters.AdapterConfig]
) -> Iterator[tuple[str, torch.Tensor]]:
    ids = _ids()
    # Given, since models count them from different numbers on.
    positions = torch.arange(ids.shape[1])[None]
    yield "ids", ids
    with torch.no_grad():
        yield "base", model(ids, position_ids=positions).logits
        # What it adds is born in training.
        adapters.init(model)
        model.eval()
        for name, config in recipes.items():
            model.add_adapter(name, config=config)
            own = [item for item in model.named_parameters() if f".{name}." in item[0]]
            _draw((item for item in own if "parametrizations" not in item[0]), 0.3)
            _turn(model, name)
            model.set_active_adapters(name)
            own_head = name == "with_head"
            if own_head:
                kept = model.lm_head.weight.clone()
                _draw(model.lm_head.named_parameters(), 0.3)
            yield name, model(ids, position_ids=positions).logits
            model.save_adapter(
                str(base / name), name, with_head=own_head, use_safetensors=name not in _PICKLED
            )
            if own_head:
                model.lm_head.weight.copy_(kept)
            _halve(base / name)
            model.delete_adapter(name)


def _hidden_states(base: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    model = transformers.BertModel.from_pretrained(
        base, is_decoder=False, add_pooling_layer=False, dtype=torch.float32
    ).eval()
    adapters.init(model)
    with torch.no_grad():
        yield "base", model(_ids()).last_hidden_state
        for name in names:
            model.load_adapter(str(base / name), set_active=True, use_safetensors=True)
            yield name, model(_ids()).last_hidden_state


def _ids() -> torch.Tensor:
    return torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(1))


def _draw(parameters: Iterator[tuple[str, torch.nn.Parameter]], scale: float) -> None:
    """Random numbers that 16 bits can hold; scales and weights of norms stay around 1."""
    with torch.no_grad():
        for key, parameter in parameters:
            vector = parameter.ndim == 1 or parameter.shape[1] == 1
            around = 1.0 if vector and not key.endswith(("bias", ".b")) else 0.0
            drawn = around + torch.randn_like(parameter) * scale
            parameter.copy_(drawn.half().float())


def _turn(model: transformers.PreTrainedModel, name: str) -> None:
    """Orthogonal matrices: as torch drew them, turned by reflections, both in 16 bits."""
    for key, value in model.state_dict().items():
        if f".{name}." in key and "parametrizations" in key:
            if key.endswith("original"):
                value += torch.randn_like(value).triu(1) * 0.3
            value.copy_(value.half())


def _halve(folder: Path) -> None:
    """Keeps weights in 16 bits, those of pickles excepted."""
    weights = folder / "adapter.safetensors"
    if weights.exists():
        halves = {key: value.half() for key, value in load_file(weights).items()}
        save_file(halves, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
