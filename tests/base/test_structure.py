"""Sites of tiny random models: names, shapes, shared-input groups, accessors."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from deltamux.base.structure import SiteSpec, find_structure

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(config: transformers.PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return build(transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2))


def test_query_key_value_and_gate_up_share_their_input(llama: torch.nn.Module) -> None:
    layer = "model.layers.0."
    assert find_structure(llama).groups[:2] == [
        [layer + f"self_attn.{letter}_proj" for letter in "qkv"],
        [layer + "mlp.gate_proj", layer + "mlp.up_proj"],
    ]


def test_projections_around_norms_still_share_their_input() -> None:
    model = build(
        transformers.Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16)
    )
    assert [name[-6:] for name in find_structure(model).groups[0]] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]


def test_sites_come_in_call_order_with_embedding_first_and_head_last(
    llama: torch.nn.Module,
) -> None:
    sites = list(find_structure(llama).sites.values())
    assert (sites[0].name, sites[0].kind) == ("model.embed_tokens", "embedding")
    assert (sites[-1].name, sites[-1].kind) == ("lm_head", "head")
    assert {site.kind for site in sites[1:-1]} == {"linear", "norm"}
    assert len(sites) == 2 + 2 * 9 + 1


def test_linear_modules_are_known_in_the_order_in_which_the_model_holds_them() -> None:
    config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=48)
    model = build(config)
    structure = find_structure(model)
    assert list(structure.registered) == [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    assert structure.registered[structure.head] == "head"


def test_shapes_are_those_of_the_product(llama: torch.nn.Module) -> None:
    structure = find_structure(llama)
    for name, site in structure.sites.items():
        if site.kind in ("linear", "head"):
            assert structure.weight(name).shape == (site.out_features, site.in_features)
            rows = torch.randn(3, site.in_features)
            assert llama.get_submodule(name)(rows).shape == (3, site.out_features)


def test_conv1d_is_seen_through_a_transposed_view() -> None:
    model = build(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    structure = find_structure(model)
    name = "transformer.h.0.attn.c_attn"
    site, weight = structure.sites[name], structure.weight(name)
    assert site.conv1d and (site.in_features, site.out_features) == (32, 96)
    assert weight.data_ptr() == model.get_submodule(name).weight.data_ptr()
    x = torch.randn(5, 32)
    torch.testing.assert_close(
        torch.nn.functional.linear(x, weight, structure.bias(name)),
        model.get_submodule(name)(x),
    )


def test_embedding_reports_rows_width_and_scale() -> None:
    config = transformers.Gemma3TextConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8
    )
    structure = find_structure(build(config))
    site = structure.sites["model.embed_tokens"]
    assert (site.in_features, site.out_features) == structure.weight(site.name).shape == (64, 32)
    assert site.embed_scale == pytest.approx(32**0.5)
    assert structure.bias(site.name) is None


def test_norms_of_token_rows_and_of_their_heads_are_sites() -> None:
    model = build(
        transformers.Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16)
    )
    structure = find_structure(model)
    norms = [site for site in structure.sites.values() if site.kind == "norm"]
    assert {site.name.rpartition(".")[2] for site in norms} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "q_norm",
        "k_norm",
    }
    assert all(structure.weight(site.name).shape == (site.out_features,) for site in norms)
    widths = {(site.in_features, site.token_axis, site.group) for site in norms}
    assert widths == {(32, None, None), (16, 1, None)}


def test_rows_of_heads_are_views_by_token() -> None:
    x = torch.randn(1, 4, 5, 3)
    site = SiteSpec("norm", "norm", 3, 3, token_axis=2)
    assert torch.equal(site.rows(x), x[0].transpose(0, 1))
    site.rows(x)[2] = 0
    assert x[0, :, 2].eq(0).all() and x.ne(0).sum() == 4 * 4 * 3


def test_a_tied_head_is_known(llama: torch.nn.Module) -> None:
    tied = transformers.LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=True)
    structures = [find_structure(llama), find_structure(build(tied))]
    assert [structure.tied for structure in structures] == [False, True]
    assert {(s.embedding, s.head) for s in structures} == {("model.embed_tokens", "lm_head")}


def test_two_norms_of_one_input_share_no_product() -> None:
    config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=48, use_parallel_residual=True)
    sites = find_structure(build(config)).sites.values()
    assert all(site.group is None for site in sites if site.kind == "norm")


def test_embedding_that_takes_more_than_ids_is_no_site() -> None:
    config = transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)
    kinds = [
        site.name
        for site in find_structure(build(config)).sites.values()
        if site.kind == "embedding"
    ]
    assert kinds == ["model.decoder.embed_tokens"]


def test_hooks_are_gone_after_the_trace(llama: torch.nn.Module) -> None:
    find_structure(llama)
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_siblings_whose_input_is_changed_in_between_are_no_group(llama: torch.nn.Module) -> None:
    class Altering(torch.nn.Module):
        def __init__(self, mlp: torch.nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = mlp.gate_proj, mlp.up_proj
            self.down_proj = mlp.down_proj

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.gate_proj(x)
            return self.down_proj(gate * self.up_proj(x.mul_(2)))

    model = copy.deepcopy(llama)
    model.model.layers[0].mlp = Altering(model.model.layers[0].mlp)
    names = find_structure(model).groups
    assert [len(group) for group in names] == [3, 3, 2]
    assert names[2] == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
