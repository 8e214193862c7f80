"""How far the base with its adapter is from the fine-tune itself, on sample prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.extract.reconstruct import reconstruct
from deltamux.extract.report import LogitDifference
from deltamux.extract.samples import token_ids


def logit_difference(
    base_folder: Path, tuned_folder: Path, adapter: Path, texts: tuple[str, ...]
) -> LogitDifference:
    """Runs one model after the other, in float32 on the CPU; only one is in memory."""
    model = _load(tuned_folder)
    prompts = token_ids(texts, str(base_folder), model.config.vocab_size)
    tuned = _logits(model, prompts)
    model = _load(base_folder)
    base = _logits(model, prompts)
    reconstruct(model, adapter)
    ours = _logits(model, prompts)
    return LogitDifference(
        prompts=len(prompts),
        largest=float((ours - tuned).abs().max()),
        same_choice=float((ours.argmax(-1) == tuned.argmax(-1)).float().mean()),
        base_largest=float((base - tuned).abs().max()),
    )


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()


@torch.inference_mode()
def _logits(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """[tokens of all prompts, V]; each prompt runs alone."""
    return torch.cat([model(torch.tensor([prompt])).logits[0].float() for prompt in prompts])
