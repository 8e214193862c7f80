"""Tiny random base models, adapters that PEFT itself writes for them, and PEFT's own logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.adapters.adapter import Adapter
from deltamux.adapters.parse import parse_adapter
from deltamux.adapters.rows import Rows
from deltamux.adapters.sites import DeviceSites
from deltamux.base.structure import find_structure
from deltamux_kernels.segments import Segments

CPU = torch.device("cpu")
SLOTS = 6

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "llama_tied": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama_bias": lambda: transformers.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SMALL),
    "mixtral": lambda: transformers.MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
}


def build_base(name: str) -> PreTrainedModel:
    """A frozen random model whose matrices are large enough for every part to matter."""
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


def peft_logits(base: PreTrainedModel, folder: Path, ids: Tensor) -> Tensor:
    """What PEFT answers with this adapter alone, loaded anew from its files."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        logits: Tensor = model(ids).logits
        return logits


@dataclass
class Served:
    """A base with device sites, to run batches of [sequences, tokens] with one slot each."""

    base: PreTrainedModel
    arena_bytes: int = 8 << 20
    rows: Rows = field(default_factory=lambda: Rows(CPU))

    def __post_init__(self) -> None:
        self.structure = find_structure(self.base)
        self.model = copy.deepcopy(self.base)
        self.sites = DeviceSites(
            self.model, self.structure, self.rows, SLOTS, self.arena_bytes, torch.float32, CPU
        )

    def parse(self, folder: Path) -> Adapter:
        return parse_adapter(folder, folder.name, self.structure, torch.float32)

    def load(self, slot: int, folder: Path) -> Adapter:
        adapter = self.parse(folder)
        assert self.sites.reserve(slot, adapter)
        self.sites.write(slot, adapter)
        return adapter

    def logits(self, ids: Tensor, slots: Sequence[int | None]) -> Tensor:
        """Logits of `ids` [sequences, tokens], each sequence with the adapter of its slot."""
        length = ids.shape[1]
        spans = [(s, i * length, (i + 1) * length) for i, s in enumerate(slots) if s is not None]
        segments = Segments.build(spans, CPU)
        self.rows.set(segments, segments)
        with torch.no_grad():
            positions = torch.arange(length).expand(ids.shape)
            logits: Tensor = self.model(ids, position_ids=positions, use_cache=False).logits
            return logits


@pytest.fixture(scope="session")
def bases() -> Callable[[str], PreTrainedModel]:
    built: dict[str, PreTrainedModel] = {}

    def base(name: str) -> PreTrainedModel:
        if name not in built:
            built[name] = build_base(name)
        return built[name]

    return base


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 61, (4, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def llama(bases: Callable[[str], PreTrainedModel]) -> nn.Module:
    return bases("llama")
