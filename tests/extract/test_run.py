"""Extraction from real checkpoints: what is stored, what it stands for, what is refused."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.adapters.checkpoint.files import CONFIG, WEIGHTS
from deltamux.errors import InvalidArgument
from deltamux.extract.forms import Form, FormName
from deltamux.extract.reconstruct import reconstruct
from deltamux.extract.report import Extraction
from deltamux.extract.run import extract

Change = Callable[[PreTrainedModel], None]

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda **more: transformers.LlamaConfig(**LLAMA | more),
    "gpt2": lambda **more: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, **more
    ),
    "gpt_neox": lambda **more: transformers.GPTNeoXConfig(**LLAMA, **more),
    "opt": lambda **more: transformers.OPTConfig(
        **SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **more
    ),
    "mixtral": lambda **more: transformers.MixtralConfig(
        **LLAMA, num_key_value_heads=2, num_local_experts=2, **more
    ),
}
QUERY = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def build(name: str, **config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](**config)).eval()


def move(model: PreTrainedModel, *endings: str) -> None:
    """A structured change, a few directions over noise, of the parameters that end so."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(endings or ("",)):
                noise = 0.01 * torch.randn_like(parameter)
                if parameter.ndim == 2:
                    rows, columns = parameter.shape
                    noise += 0.05 * torch.randn(rows, 2) @ torch.randn(2, columns)
                parameter.add_(noise)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Extraction]:
    """run(base, tuned, form, **how) -> the extraction, its adapter in tmp_path/out."""

    def run(
        base: PreTrainedModel, tuned: PreTrainedModel, form: Form = EXACT, **how: object
    ) -> Extraction:
        base.save_pretrained(tmp_path / "base", **how)
        tuned.save_pretrained(tmp_path / "tuned", **how)
        return again(tmp_path, form)

    return run


EXACT = Form("exact")


def again(folder: Path, form: Form = EXACT) -> Extraction:
    (folder / "out").mkdir(exist_ok=True)
    return extract(folder / "base", folder / "tuned", folder / "out", form, lambda *_: None)


def rebuilt(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model = copy.deepcopy(base)
    reconstruct(model, folder / "out")
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_exact_form_gives_the_fine_tune_back_to_the_bit(
    name: str, tied: bool, run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build(name, tie_word_embeddings=tied)
    tuned = copy.deepcopy(base)
    move(tuned)
    report = run(base, tuned)
    assert report.unchanged == 0
    assert {stored.form for stored in report.stored} == {"exact"}
    for name, parameter in rebuilt(base, tmp_path).named_parameters():
        assert torch.equal(parameter, tuned.get_parameter(name)), name


def test_what_did_not_change_is_left_out(run: Callable[..., Extraction], tmp_path: Path) -> None:
    base = build("llama")
    tuned = copy.deepcopy(base)
    move(tuned, "0.self_attn.q_proj.weight", "model.norm.weight")
    report = run(base, tuned)
    assert [stored.parameter for stored in report.stored] == [QUERY, "model.norm.weight"]
    assert report.unchanged == len(list(base.parameters())) - 2
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert set(tensors) == {
        f"{parameter}.{part}"
        for parameter in (QUERY, "model.norm.weight")
        for part in ("value", "base")
    }
    assert report.bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert report.full_bytes == (tmp_path / "tuned" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "form",
    [Form("low-rank", rank=3), Form("low-rank", energy=0.8), Form("sparse"), Form("one-bit")],
    ids=lambda form: form.name,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_errors_are_those_of_the_reconstruction(
    name: str, form: Form, run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build(name)
    tuned = copy.deepcopy(base)
    move(tuned)
    report = run(base, tuned, form)
    ours = rebuilt(base, tmp_path)
    compressed = [stored for stored in report.stored if stored.form == form.name]
    assert len(compressed) == {"llama": 14, "gpt2": 8}[name]
    for stored in report.stored:
        target, start, made = (m.get_parameter(stored.parameter) for m in (tuned, base, ours))
        error = float(((made - target).norm() / (target - start).norm()).detach())
        assert error == pytest.approx(stored.relative_error, abs=1e-5)
        assert (error == 0) == (stored.form == "exact")
        if form.name == "low-rank" and form.rank is None:
            assert error**2 <= 0.2 + 1e-6
    linear = sum(stored.bytes for stored in compressed)
    assert linear < sum(stored.full_bytes for stored in compressed)


def test_a_form_that_is_no_smaller_gives_way_to_the_exact_one(
    run: Callable[..., Extraction],
) -> None:
    base = build("llama")
    tuned = copy.deepcopy(base)
    move(tuned)
    report = run(base, tuned, Form("low-rank", energy=1.0))
    assert {stored.form for stored in report.stored} == {"exact"}


@pytest.mark.parametrize("form", [EXACT, Form("one-bit")], ids=lambda form: form.name)
def test_few_changed_numbers_or_rows_are_stored_alone_and_without_loss(
    form: Form, run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build("llama").bfloat16()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.get_parameter(DOWN)[3, ::11] *= 1.5
        tuned.model.embed_tokens.weight[[5, 60]] += 1
        tuned.lm_head.weight[60] += 1
    report = run(base, tuned, form)
    assert [(stored.parameter, stored.form) for stored in report.stored] == [
        ("model.embed_tokens.weight", "exact rows"),
        (DOWN, "exact numbers"),
        ("lm_head.weight", "exact rows"),
    ]
    assert all(stored.bytes < stored.full_bytes for stored in report.stored)
    for name, parameter in rebuilt(base, tmp_path).named_parameters():
        assert torch.equal(parameter, tuned.get_parameter(name)), name


def test_shards_and_one_file_give_the_same_adapter(
    run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build("llama")
    tuned = copy.deepcopy(base)
    move(tuned)
    run(base, tuned, Form("one-bit"))
    one = (tmp_path / "out" / WEIGHTS).read_bytes()
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "tuned" / "model.safetensors").unlink()
    run(base, tuned, Form("one-bit"), max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 3
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == one


def test_the_shards_of_an_earlier_save_are_not_read(
    run: Callable[..., Extraction], tmp_path: Path
) -> None:
    """As transformers does: what it would load is what is compared."""
    base = build("llama")
    tuned = copy.deepcopy(base)
    move(tuned)
    run(base, tuned, max_shard_size="20KB")
    move(tuned, "model.norm.weight")
    save_file(tuned.state_dict(), tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    again(tmp_path)
    for name, parameter in rebuilt(base, tmp_path).named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_float64_is_rounded_as_for_a_server(run: Callable[..., Extraction], tmp_path: Path) -> None:
    base = build("llama").double()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    run(base, tuned)
    served, loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("base", "tuned")
    )
    for name, parameter in rebuilt(served, tmp_path).named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_a_head_that_the_fine_tune_no_longer_ties_is_stored_whole(
    run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build("llama", tie_word_embeddings=True)
    tuned = build("llama", tie_word_embeddings=False)
    tuned.load_state_dict(base.state_dict())
    move(tuned, "embed_tokens.weight")
    report = run(base, tuned)
    assert [stored.parameter for stored in report.stored] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(rebuilt(base, tmp_path)(ids).logits, tuned(ids).logits)


def test_a_bias_that_the_base_does_not_have(run: Callable[..., Extraction], tmp_path: Path) -> None:
    base, tuned = build("llama"), build("llama", attention_bias=True)
    tuned.load_state_dict(base.state_dict(), strict=False)
    move(tuned, ".bias")
    assert {stored.parameter[-5:] for stored in run(base, tuned).stored} == {".bias"}
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(rebuilt(base, tmp_path)(ids).logits, tuned(ids).logits)


def test_keys_without_the_models_prefix_and_other_dtypes_are_understood(
    run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build("gpt2").bfloat16()
    tuned = copy.deepcopy(base).float()
    move(tuned, "h.1.mlp.c_fc.weight")
    run(base, tuned)
    mask = {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    rewrite(
        tmp_path / "base",
        lambda tensors: {k.removeprefix("transformer."): t for k, t in tensors.items()} | mask,
    )
    report = again(tmp_path)
    assert [s.parameter for s in report.stored] == ["transformer.h.1.mlp.c_fc.weight"]


class LiveBytes(TorchDispatchMode):
    """What all tensors that any operation has seen take together, at its most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._seen: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, results)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._seen[id(tensor)] = tensor
        sizes = {t.data_ptr(): t.numel() * t.element_size() for t in self._seen.values()}
        self.most = max(self.most, sum(sizes.values()))
        return results


@pytest.mark.parametrize("form", ["exact", "sparse", "one-bit"])
def test_memory_is_bounded_by_one_pair_of_tensors(
    form: FormName, run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build("llama", num_hidden_layers=12)
    tuned = copy.deepcopy(base)
    move(tuned)
    run(base, tuned)
    sizes = [parameter.numel() * 4 for parameter in base.parameters()]
    with LiveBytes() as live:
        again(tmp_path, Form(form))
    # A pair, and what is made of its difference.
    assert live.most <= 5 * max(sizes) < sum(sizes) / 10


def broken(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "tuned", change)


def reconfigured(**fields: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "tuned" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken(lambda t: {k: v for k, v in t.items() if k != QUERY}), f"lacks {QUERY}"),
        (broken(lambda t: t | {"extra.weight": torch.ones(2)}), "extra.weight changed"),
        (broken(lambda t: t | {QUERY: torch.ones(33, 32)}), "has shape"),
        (broken(lambda t: t | {QUERY: t[QUERY] / 0}), "NaN or infinity"),
        (broken(lambda t: t | {QUERY: t[QUERY].to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
        (broken(lambda t: t | {QUERY.replace("model.", "", 1): t[QUERY] + 0}), "twice"),
        (reconfigured(rms_norm_eps=0.5), "the configs differ in rms_norm_eps"),
        (reconfigured(tie_word_embeddings=True), "differ, but its config ties them"),
        (reconfigured(model_type="telepathy"), "is no model"),
        (reconfigured(num_attention_heads=0), "is no model: ZeroDivisionError"),
        (reconfigured(hidden_act="shrug"), "is no language model: KeyError: 'shrug'"),
        (lambda folder: (folder / "tuned" / "model.safetensors").unlink(), "is no model"),
        (
            lambda folder: (folder / "tuned" / "model.safetensors").write_bytes(b"x"),
            "cannot be read",
        ),
        (
            lambda folder: (folder / "tuned" / "model.safetensors").rename(
                folder / "tuned" / "pytorch_model.bin"
            ),
            "a pickle",
        ),
    ],
)
def test_what_is_no_fine_tune_of_the_base_is_refused(
    damage: Callable[[Path], object],
    message: str,
    run: Callable[..., Extraction],
    tmp_path: Path,
) -> None:
    base = build("llama")
    tuned = copy.deepcopy(base)
    move(tuned)
    run(base, tuned)
    (tmp_path / "out" / WEIGHTS).unlink()
    damage(tmp_path)
    with pytest.raises(InvalidArgument, match=message):
        again(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG}


def test_settings_that_change_no_answer_may_differ(
    run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build("llama")
    tuned = copy.deepcopy(base)
    move(tuned, "q_proj.weight")
    run(base, tuned)
    reconfigured(use_cache=False, attention_dropout=0.1, unsloth_version="1")(tmp_path)
    assert len(again(tmp_path).stored) == 2


def test_the_same_weights_are_refused(run: Callable[..., Extraction]) -> None:
    base = build("llama")
    with pytest.raises(InvalidArgument, match="the same weights"):
        run(base, base)


def test_changed_experts_are_refused_and_unchanged_ones_are_no_matter(
    run: Callable[..., Extraction],
) -> None:
    base = build("mixtral")
    tuned = copy.deepcopy(base)
    move(tuned, "q_proj.weight")
    assert len(run(base, tuned).stored) == 2
    move(tuned, "experts.down_proj")
    with pytest.raises(InvalidArgument, match="experts"):
        run(base, tuned)


def test_unchanged_experts_may_have_another_dtype_and_nothing_beside_them_may_be_missing(
    run: Callable[..., Extraction], tmp_path: Path
) -> None:
    base = build("mixtral").bfloat16()
    tuned = copy.deepcopy(base).float()
    move(tuned, "q_proj.weight")
    assert len(run(base, tuned).stored) == 2
    rewrite(tmp_path / "tuned", lambda t: {k: v for k, v in t.items() if k != QUERY})
    with pytest.raises(InvalidArgument, match=f"lacks {QUERY}"):
        again(tmp_path)


def test_changed_positions_that_are_no_site_are_refused(run: Callable[..., Extraction]) -> None:
    base = build("opt")
    tuned = copy.deepcopy(base)
    move(tuned, "q_proj.weight")
    assert len(run(base, tuned).stored) == 2
    move(tuned, "embed_positions.weight")
    with pytest.raises(InvalidArgument, match=r"embed_positions\.weight changed"):
        run(base, tuned)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, intermediate_size=48)
    for name in ("base", "tuned"):
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
    with pytest.raises(InvalidArgument, match="'bert' is an encoder"):
        again(tmp_path)
