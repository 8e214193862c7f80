"""Tiny random base models, adapters that PEFT itself writes for them, and PEFT's own logits."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.adapters.sites.rows import Rows
from deltamux.base.probe import probe
from deltamux.base.stacked_linears import stack_linears
from deltamux.base.structure import find_structure
from deltamux_kernels.segments import Segments

# Threads cost more than they bring at this size, above all when other work shares the cores.
torch.set_num_threads(1)

CPU = torch.device("cpu")
PEERS = Path(__file__).parents[1] / "peers"
SLOTS = 6
# Leave nothing of the base's answer to rounding: an adapter must move its logits by more.
LEAST_EFFECT = 0.1

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
_GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "llama_tied": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama_bias": lambda: transformers.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=8),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8),
    "phi3": lambda: transformers.Phi3Config(
        **_GROUPED, pad_token_id=0, bos_token_id=0, eos_token_id=0
    ),
    "phi": lambda: transformers.PhiConfig(**_GROUPED),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, **_TOKENS),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SMALL),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "qwen3_moe_dense": lambda: transformers.Qwen3MoeConfig(
        **_GROUPED,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0],
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_GROUPED,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
}


def build_base(name: str) -> PreTrainedModel:
    """A frozen random model whose matrices are large enough for every part to matter.

    Under the name of a folder in tests/peers it is the one whose answers are kept there.
    """
    if "/" in name:
        kept = AutoModelForCausalLM.from_pretrained(
            PEERS / name, dtype=torch.float32, attn_implementation="eager"
        )
        return kept.eval().requires_grad_(False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def save_adapter(base: PreTrainedModel, folder: Path, seed: int = 0, **config: object) -> Path:
    """A LoRA adapter with random numbers in all its tensors, as PEFT saves it."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
                elif "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.15)
        model.save_pretrained(folder)
    return folder


def peft_logits(base: PreTrainedModel, folder: Path, ids: Tensor, **options: object) -> Tensor:
    """What PEFT answers with this adapter alone, loaded anew from its files."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        logits: Tensor = model(ids, **options).logits
        return logits


@dataclass
class Served:
    """A base with device sites, to run batches of [sequences, tokens] with one slot each."""

    base: PreTrainedModel
    arena_bytes: int = 8 << 20
    stacked: bool = False
    rows: Rows = field(default_factory=lambda: Rows(CPU))

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.base)
        self.structure = find_structure(self.model, probe(self.model))
        if self.stacked:
            stack_linears(self.model, self.structure)
        self.sites = DeviceSites(
            self.model, self.structure, self.rows, SLOTS, self.arena_bytes, torch.float32, CPU
        )

    def parse(self, folder: Path, dtype: torch.dtype = torch.float32) -> Adapter:
        return parse_adapter(folder, folder.name, self.structure, dtype)

    def load(self, slot: int, folder: Path) -> Adapter:
        adapter = self.parse(folder)
        assert self.sites.reserve(slot, adapter)
        self.sites.write(slot, adapter)
        return adapter

    def logits(self, ids: Tensor, slots: Sequence[int | None], last_only: bool = False) -> Tensor:
        """Logits of `ids` [sequences, tokens], each sequence with the adapter of its slot."""
        tokens = _segments(slots, ids.shape[1])
        self.rows.set(tokens, _segments(slots, 1) if last_only else tokens)
        with torch.no_grad():
            positions = torch.arange(ids.shape[1]).expand(ids.shape)
            output = self.model(
                ids, position_ids=positions, use_cache=False, logits_to_keep=int(last_only)
            )
            logits: Tensor = output.logits
            return logits


def _segments(slots: Sequence[int | None], rows: int) -> Segments:
    spans = [(s, i * rows, (i + 1) * rows) for i, s in enumerate(slots) if s is not None]
    return Segments.build(spans, CPU)


@pytest.fixture(scope="session")
def base() -> Callable[[str], PreTrainedModel]:
    """base(name) -> the one model of that name."""
    return cache(build_base)


@pytest.fixture(scope="session")
def serve(base: Callable[[str], PreTrainedModel]) -> Callable[..., Served]:
    """serve(name) -> a copy of that base with empty device sites."""
    return lambda name, **options: Served(base(name), **options)


@pytest.fixture(scope="session")
def save(base: Callable[[str], PreTrainedModel], tmp_path_factory: Any) -> Callable[..., Path]:
    """save(name, **LoraConfig) -> the folder of a new adapter of that base."""

    def save(name: str, **config: object) -> Path:
        return save_adapter(base(name), tmp_path_factory.mktemp("adapter"), **config)

    return save


@pytest.fixture(scope="session")
def tune(base: Callable[[str], PreTrainedModel], tmp_path_factory: Any) -> Callable[..., Path]:
    """tune(name, config, seed) -> the folder of an adapter whose trained parts were all moved;
    further options are save_pretrained's."""

    def tune(name: str, config: peft.PeftConfig, seed: int = 0, **options: object) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("adapter")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(copy.deepcopy(base(name)), copy.deepcopy(config))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder, **options)
        return folder

    return tune


@pytest.fixture(scope="session")
def reference(base: Callable[[str], PreTrainedModel]) -> Callable[..., Tensor]:
    """reference(name, folder, ids) -> PEFT's logits for that adapter alone."""
    return lambda name, folder, ids, **options: peft_logits(base(name), folder, ids, **options)


@pytest.fixture
def as_in_peft(
    serve: Callable[..., Served], reference: Callable[..., Tensor], ids: Tensor
) -> Callable[[str, Sequence[Path]], None]:
    """as_in_peft(name, folders): asserts it of each in one batch with a row without adapter."""

    def as_in_peft(name: str, folders: Sequence[Path]) -> None:
        served = serve(name)
        for slot, folder in enumerate(folders):
            served.load(slot, folder)
        slots = [None, *range(len(folders))]
        plain = served.logits(ids[: len(slots)], [None] * len(slots))
        mixed = served.logits(ids[: len(slots)], slots)
        assert torch.equal(mixed[0], plain[0])
        for row, folder in enumerate(folders, start=1):
            expected = reference(name, folder, ids[row : row + 1])[0]
            assert (expected - plain[row]).abs().max() > LEAST_EFFECT
            torch.testing.assert_close(mixed[row], expected, atol=3e-5, rtol=1e-5)

    return as_in_peft


@pytest.fixture
def rewrite(tmp_path: Path) -> Callable[..., Path]:
    """rewrite(folder, change) -> a copy of the adapter whose tensors went through `change`."""

    def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        copied = shutil.copytree(folder, tmp_path / "rewritten")
        tensors = {name: t.contiguous() for name, t in change(load_file(folder / WEIGHTS)).items()}
        save_file(tensors, copied / WEIGHTS)
        return copied

    return rewrite


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 61, (5, 7), generator=torch.Generator().manual_seed(5))
