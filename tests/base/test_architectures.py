"""Architectures driven packed and paged, held to transformers' own generate one prompt at a time.

Tiny random float32 models; matrices are multiplied by four, so that masks, windows and positions
show in the logits (with the usual initialisation attention is nearly uniform).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from deltamux.adapters.sites.rows import Rows
from deltamux.base.load import adopt
from deltamux.engine.kv.kv_cache import KVCache
from deltamux.engine.outcome import SampledToken
from deltamux.engine.rehearsal import rehearse, trial_sequence
from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.step.batch import StepBatch
from deltamux.engine.step.runner import ModelRunner
from deltamux.errors import StartupError
from deltamux.wire.messages import Sampling

VOCABULARY, WINDOW, BLOCK = 96, 8, 4
PROMPT_LENGTHS, NEW_TOKENS, TOKENS_PER_STEP = (23, 5, 14, 1), 8, 11

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNGROUPED = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
ALTERNATING = {
    "head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS = {"num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "qwen2": lambda: hf.Qwen2Config(**SMALL),
    "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(
        **SMALL, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, **ALTERNATING, query_pre_attn_scalar=8),
    "phi3": lambda: hf.Phi3Config(**SMALL),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128
    ),
    "opt": lambda: hf.OPTConfig(**UNGROUPED, ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**UNGROUPED),
    "starcoder2": lambda: hf.Starcoder2Config(**SMALL, sliding_window=WINDOW),
    "cohere": lambda: hf.CohereConfig(**SMALL),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "mixtral": lambda: hf.MixtralConfig(
        **SMALL, **EXPERTS, num_local_experts=4, sliding_window=WINDOW
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SMALL, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16
    ),
    "gpt_oss": lambda: hf.GptOssConfig(**SMALL, **EXPERTS, **ALTERNATING, num_local_experts=4),
}


def build(config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
            if name.endswith("sinks"):
                parameter.normal_()
    model.generation_config.eos_token_id = None
    return model


def reference(model: hf.PreTrainedModel, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Generated tokens and the logits behind each, from transformers alone."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return output.sequences[0].tolist(), torch.cat(output.logits)


class RecordingRunner(ModelRunner):
    """Keeps the logits of every sampled row."""

    def forward(self, batch: StepBatch, rows: Tensor | None = None) -> Tensor:
        logits = super().forward(batch, rows)
        for item, row in zip(batch.sampled, logits, strict=True):
            self.seen.setdefault(item.sequence.index, []).append(row.clone())
        return logits

    seen: dict[int, list[Tensor]]


def generate(runner: RecordingRunner, prompts: list[list[int]]) -> list[Sequence]:
    """A new sequence every second step, chunked prefill beside decoding, blocks in any order."""
    runner.seen = {}
    free = list(range(1, 64))
    random.Random(0).shuffle(free)
    waiting = [trial_sequence(i, prompt, [], Sampling()) for i, prompt in enumerate(prompts)]
    sequences, running, step = list(waiting), [], 0
    while waiting or running:
        if waiting and step % 2 == 0:
            running.insert(0, waiting.pop(0))
        scheduled, budget = [], TOKENS_PER_STEP
        for sequence in running:
            if count := min(sequence.num_uncomputed, budget):
                scheduled.append(Scheduled(sequence, count))
                budget -= count
        for item in scheduled:
            while len(item.sequence.blocks) * BLOCK < item.sequence.num_computed + item.num_tokens:
                item.sequence.blocks.append(free.pop())
        outcomes = runner.run(scheduled)
        sampling = [item.sequence for item in scheduled if item.yields]
        for item in scheduled:
            item.sequence.num_computed += item.num_tokens
        for sequence, outcome in zip(sampling, outcomes, strict=True):
            assert isinstance(outcome, SampledToken)
            sequence.tokens.append(outcome.token_id)
            if sequence.num_generated == NEW_TOKENS:
                running.remove(sequence)
                free += sequence.blocks
        step += 1
    return sequences


@pytest.mark.parametrize("architecture", CONFIGS)
def test_tokens_and_logits_are_those_of_generate(architecture: str) -> None:
    model = build(CONFIGS[architecture]())
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    expected = [reference(model, prompt) for prompt in prompts]

    base = adopt(model)
    rehearse(base, BLOCK)
    cache = KVCache(base.layers, 64, BLOCK, base.dtype, base.device)
    for pages in (*cache.keys, *cache.values):
        pages[1:] = torch.nan
    runner = RecordingRunner(base, cache, Rows(base.device))
    sequences = generate(runner, prompts)

    for sequence, (tokens, logits) in zip(sequences, expected, strict=True):
        assert sequence.tokens == tokens
        torch.testing.assert_close(
            torch.stack(runner.seen[sequence.index]), logits, atol=1e-4, rtol=0
        )


REFUSED: dict[str, tuple[Callable[[], hf.PreTrainedConfig], str]] = {
    "bloom": (
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "'bloom' models: 0 of 2 layers call transformers' AttentionInterface",
    ),
    "gpt_neo": (
        lambda: hf.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=4,
            window_size=WINDOW,
        ),
        "'gpt_neo' models: 0 of 2 layers",
    ),
    "mamba2": (
        lambda: hf.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=8,
            state_size=8,
            n_groups=1,
        ),
        "'mamba2' models: they keep a recurrent state",
    ),
    "llama4": (
        lambda: hf.Llama4TextConfig(
            **SMALL,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention"],
        ),
        "layers of type chunked_attention are not implemented",
    ),
    "dynamic rope": (
        lambda: hf.LlamaConfig(
            **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
        ),
        "'llama' models: their dynamic rotary embedding depends on the longest sequence",
    ),
    "longrope": (
        lambda: hf.Phi3Config(
            **SMALL,
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            },
        ),
        "'phi3' models: their longrope rotary embedding",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_answer_wrongly_is_refused_with_its_reason(name: str) -> None:
    config, reason = REFUSED[name]
    model = hf.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(StartupError) as refusal:
        adopt(model)
    assert reason in refusal.value.message
