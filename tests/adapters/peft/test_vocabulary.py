"""Adapters of resized models against PEFT on the resized model, in one batch with all others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamux.adapters.peft import vocabulary
from deltamux.adapters.primitives.added_tokens import AddedTokens
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]
Tensors = dict[str, Tensor]

KNOWN = 61
EMBEDDING = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"


def resized(base: PreTrainedModel, size: int) -> PreTrainedModel:
    """With rows for added tokens that are nobody's mean: they must come from the checkpoint."""
    model = copy.deepcopy(base)
    # As a model that was loaded and resized: PEFT then finds no config to compare with.
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            module.weight[KNOWN:].normal_()
    return model


@pytest.fixture(scope="session")
def tune_resized(base: Make, tmp_path_factory: Any) -> Callable[..., Path]:
    """tune_resized(name, size, config, seed) -> an adapter trained on the base with `size` tokens;
    what of its embedding and head PEFT saves is left to `embeddings`."""

    def tune(
        name: str, size: int, config: peft.PeftConfig, seed: int = 0, embeddings: Any = True
    ) -> Path:
        torch.manual_seed(seed)
        folder: Path = tmp_path_factory.mktemp("adapter")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(resized(base(name), size), copy.deepcopy(config))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder, save_embedding_layers=embeddings)
        return folder

    return tune


def peft_logits(base: PreTrainedModel, size: int, folder: Path, ids: Tensor) -> Tensor:
    """PEFT's answer, on a model that was resized anew: its own rows are others."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(resized(base, size), folder).eval()
        logits: Tensor = model(input_ids=ids).logits
        return logits[:, -ids.shape[1] :]


@pytest.fixture
def as_in_peft_resized(
    base: Make, serve: Make, save: Make
) -> Callable[[str, Sequence[tuple[Path, int]]], Any]:
    """as_in_peft_resized(name, [(folder, size), ...]): asserts it of each, over all its columns, in
    one batch with LoRA and the base, which must not notice."""

    def compare(name: str, adapters: Sequence[tuple[Path, int]]) -> Any:
        served = serve(name)
        for slot, (folder, _) in enumerate(adapters):
            served.load(slot, folder)
        lora = len(adapters)
        served.load(lora, save(name, r=4, target_modules="all-linear"))
        slots = [None, *range(len(adapters)), lora]
        prompt = torch.randint(0, KNOWN, (len(slots), 6))
        plain = served.logits(prompt, [None, *[None] * lora, lora])
        for row, (_, size) in enumerate(adapters, start=1):
            # The last one among the added, where there are any.
            prompt[row, 2::3] = torch.randint(min(KNOWN, size - 1), size, (2,))
            prompt[row, -1] = size - 1
        mixed = served.logits(prompt, slots)
        for row in (0, -1):
            assert torch.equal(mixed[row, :, :KNOWN], plain[row])
        for row, (folder, size) in enumerate(adapters, start=1):
            expected = peft_logits(base(name), size, folder, prompt[row : row + 1])[0]
            assert expected.shape[1] == size
            torch.testing.assert_close(mixed[row, :, :size], expected, atol=3e-5, rtol=1e-5)
        return served

    return compare


def lora(name: str, **options: Any) -> peft.LoraConfig:
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    return peft.LoraConfig(r=3, target_modules=targets, **options)


NAMES = ["llama", "llama_tied", "gpt2", "gemma2", "gemma3"]


def embedding_of(name: str) -> str:
    return "wte" if name == "gpt2" else "embed_tokens"


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_saved_beside_lora(
    name: str, tune_resized: Make, as_in_peft_resized: Make
) -> None:
    as_in_peft_resized(
        name,
        [(tune_resized(name, size, lora(name), size), size) for size in (KNOWN + 3, KNOWN + 8)],
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("embeddings", [False, True])
def test_modules_to_save(
    name: str, embeddings: bool, tune_resized: Make, as_in_peft_resized: Make
) -> None:
    both = lora(name, modules_to_save=[embedding_of(name), "lm_head"])
    tied = lora(
        name, modules_to_save=[embedding_of(name), "lm_head"], ensure_weight_tying=name != "gpt2"
    )
    one = lora(name, modules_to_save=[embedding_of(name)])
    adapters = [
        (tune_resized(name, KNOWN + 3, both, 1, embeddings), KNOWN + 3),
        (tune_resized(name, KNOWN + 5, tied, 2, embeddings), KNOWN + 5),
    ]
    if embeddings:
        adapters.append((tune_resized(name, KNOWN + 1, one, 3), KNOWN + 1))
    as_in_peft_resized(name, adapters)


@pytest.mark.parametrize("name", NAMES)
def test_trained_tokens(name: str, tune_resized: Make, as_in_peft_resized: Make) -> None:
    new = [KNOWN + 2, KNOWN, KNOWN + 1]
    some = {embedding_of(name): [5, *new], "lm_head": [5, *new]}
    as_in_peft_resized(
        name,
        [
            (tune_resized(name, KNOWN + 3, lora(name, trainable_token_indices=some)), KNOWN + 3),
            (
                tune_resized(name, KNOWN + 9, lora(name, trainable_token_indices=[7, *new]), 1),
                KNOWN + 9,
            ),
        ],
    )


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_trained_tokens_alone(
    name: str, embeddings: bool, tune_resized: Make, as_in_peft_resized: Make
) -> None:
    """Where embedding and head are one, the rows of all added tokens may be all that is saved."""
    new = [KNOWN + 1, KNOWN, 3]
    alone = peft.TrainableTokensConfig(token_indices=new, target_modules=[embedding_of(name)])
    inside = lora(name, trainable_token_indices=new)
    as_in_peft_resized(
        name,
        [
            (tune_resized(name, KNOWN + 2, config, seed, embeddings), KNOWN + 2)
            for seed, config in enumerate((alone, inside))
        ],
    )


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
        peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]),
        peft.VeraConfig(r=8, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_beside_any_family(
    config: peft.PeftConfig, tune_resized: Make, as_in_peft_resized: Make
) -> None:
    as_in_peft_resized("llama", [(tune_resized("llama", KNOWN + 2, config), KNOWN + 2)])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fewer_tokens_than_the_base(
    name: str, tune_resized: Make, as_in_peft_resized: Make
) -> None:
    both = lora(name, modules_to_save=[embedding_of(name), "lm_head"])
    as_in_peft_resized(
        name,
        [
            (tune_resized(name, KNOWN - 4, both, 1), KNOWN - 4),
            (tune_resized(name, KNOWN - 2, lora(name)), KNOWN - 2),
            (tune_resized(name, KNOWN + 2, lora(name)), KNOWN + 2),
        ],
    )


def test_the_device_holds_added_rows_only(tune_resized: Make, serve: Make) -> None:
    served = serve("llama")
    lean = served.parse(tune_resized("llama", KNOWN + 3, lora("llama")))
    payloads = [p for of_site in lean.payloads.values() for p in of_site]
    added = [p.rows.shape for p in payloads if isinstance(p, AddedTokens)]
    assert added == [(3, 32), (3, 32)]
    assert lean.traits.vocab_size == KNOWN + 3
    assert lean.host_bytes < 61 * 32 * 4


def test_a_whole_matrix_that_is_the_bases_own_takes_no_memory(
    tune_resized: Make, serve: Make, rewrite: Make, base: Make
) -> None:
    """As training leaves it where the gradients of all other rows were masked."""

    def masked(tensors: Tensors) -> Tensors:
        known = base("llama").lm_head.weight
        return tensors | {HEAD: torch.cat((known, tensors[HEAD][KNOWN:]))}

    config = lora("llama", modules_to_save=["embed_tokens", "lm_head"])
    folder = rewrite(tune_resized("llama", KNOWN + 3, config, embeddings=False), masked)
    adapter = serve("llama").parse(folder)
    assert [type(p) for p in adapter.payloads["lm_head"]] == [AddedTokens]
    assert len(adapter.payloads["model.embed_tokens"]) == 2


NEW = [KNOWN, KNOWN + 1]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", lora("llama", modules_to_save=["embed_tokens"])),
        ("llama_tied", lora("llama", modules_to_save=["embed_tokens"])),
        ("llama", lora("llama", modules_to_save=["lm_head"])),
        ("llama", lora("llama", trainable_token_indices=NEW)),
        ("llama", peft.TrainableTokensConfig(token_indices=NEW, target_modules=["embed_tokens"])),
        ("llama_tied", lora("llama", trainable_token_indices=NEW[1:])),
    ],
)
def test_rows_that_are_not_in_the_checkpoint(
    name: str, config: peft.PeftConfig, tune_resized: Make, serve: Make
) -> None:
    """PEFT loads such an adapter beside whatever rows the model was resized with."""
    with pytest.raises(DeltamuxError) as caught:
        serve(name).parse(tune_resized(name, KNOWN + 2, config, embeddings=False))
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "ADDED_TOKENS")


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "q_proj"]])
@pytest.mark.parametrize("size", [KNOWN + 2, KNOWN - 2])
def test_other_changes_of_a_resized_module(
    targets: list[str], size: int, tune_resized: Make, serve: Make
) -> None:
    config = peft.LoraConfig(r=2, target_modules=targets)
    with pytest.raises(DeltamuxError, match="in another way") as caught:
        serve("llama").parse(tune_resized("llama", size, config))
    assert caught.value.reason == "ADDED_TOKENS"


def test_changes_that_no_tensor_of_a_resized_module_tells(
    tune_resized: Make, serve: Make, rewrite: Make, base: Make
) -> None:
    """UniLoRA draws what it has of a module from a seed."""
    config = peft.UniLoraConfig(r=2, target_modules=["q_proj", "lm_head"], save_indices=False)

    def changed(tensors: Tensors) -> Tensors:
        kept = {name: t for name, t in tensors.items() if "lm_head.unilora" not in name}
        added = {EMBEDDING: base("llama").model.embed_tokens, HEAD: base("llama").lm_head}
        rows = torch.zeros(2, 32)
        return kept | {name: torch.cat((of.weight, rows)) for name, of in added.items()}

    folder = rewrite(tune_resized("llama", KNOWN + 2, config, embeddings=False), changed)
    with pytest.raises(DeltamuxError, match="more than rows") as caught:
        serve("llama").parse(folder)
    assert caught.value.reason == "ADDED_TOKENS"


def test_a_head_with_a_bias(tune_resized: Make, serve: Make) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(DeltamuxError, match="has a bias") as caught:
        serve("phi").parse(tune_resized("phi", KNOWN + 2, config))
    assert caught.value.reason == "ADDED_TOKENS"


def test_an_adapter_that_sleeps(tune_resized: Make, serve: Make) -> None:
    """Before its invocation the base computes, which has no rows for its tokens."""
    config = lora("llama", alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")
    with pytest.raises(DeltamuxError, match="part of a prompt") as caught:
        serve("llama").parse(tune_resized("llama", KNOWN + 2, config))
    assert caught.value.reason == "UNSUPPORTED_FEATURE"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({HEAD: torch.zeros(KNOWN + 2, 32)}, "ADDED_TOKENS"),
        ({HEAD: torch.zeros(KNOWN, 32)}, "ADDED_TOKENS"),
        ({HEAD: torch.zeros(KNOWN + 3, 32)}, "UNSUPPORTED_FEATURE"),
        ({HEAD: torch.zeros(KNOWN + 3, 31)}, "BASE_MISMATCH"),
        ({HEAD: torch.zeros(KNOWN + 70_000, 32), EMBEDDING: None}, "ADDED_TOKENS"),
        ({HEAD: None}, "ADDED_TOKENS"),
        ({HEAD.replace("weight", "bias"): torch.zeros(KNOWN + 3)}, "ADDED_TOKENS"),
    ],
)
def test_matrices_that_do_not_fit(
    changes: dict[str, Tensor | None],
    reason: str,
    tune_resized: Make,
    serve: Make,
    rewrite: Make,
) -> None:
    def changed(tensors: Tensors) -> Tensors:
        return {name: t for name, t in (tensors | changes).items() if t is not None}

    folder = rewrite(tune_resized("llama", KNOWN + 3, lora("llama")), changed)
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(folder)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (HEAD.replace("weight", "base_layer.weight"), "ADDED_TOKENS"),
        (HEAD.replace("base_model.model.", "base_model."), "EXTRA_TENSORS"),
    ],
)
def test_another_matrix_beside_a_saved_one(
    name: str, reason: str, tune_resized: Make, serve: Make, rewrite: Make
) -> None:
    config = lora("llama", modules_to_save=["embed_tokens", "lm_head"])
    folder = tune_resized("llama", KNOWN + 3, config)
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(rewrite(folder, lambda t: t | {name: t[HEAD] + 1}))
    assert caught.value.reason == reason


def test_a_saved_module_whose_copies_differ(tune_resized: Make, serve: Make, rewrite: Make) -> None:
    config = lora("llama", modules_to_save=["embed_tokens", "lm_head"])
    twice = HEAD.replace("weight", "modules_to_save.weight")
    folder = tune_resized("llama", KNOWN + 3, config)
    with pytest.raises(DeltamuxError, match="differ") as caught:
        serve("llama").parse(rewrite(folder, lambda t: t | {twice: t[twice] + 1}))
    assert caught.value.reason == "EXTRA_TENSORS"


def test_another_base(tune_resized: Make, serve: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bases of one width: what is taken for filling must be little."""
    monkeypatch.setattr(vocabulary, "MAX_REMOVED", 8)
    config = lora("llama", modules_to_save=["embed_tokens", "lm_head"])
    served = serve("llama")
    assert served.parse(tune_resized("llama", KNOWN - 8, config)).vocab_size == KNOWN - 8
    with pytest.raises(DeltamuxError) as caught:
        served.parse(tune_resized("llama", KNOWN - 9, config))
    assert caught.value.reason == "BASE_MISMATCH"
