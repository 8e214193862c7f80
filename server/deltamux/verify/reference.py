"""The logits of an adapter by the library that wrote it, on a model that runs it alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamux.adapters.manifest import Library, read_manifest
from deltamux.errors import FailedPrecondition
from deltamux.extract.reconstruct import reconstruct


@dataclass(frozen=True, eq=False)
class Reference:
    """Logits [tokens, V], float32 on the host, of each prompt, without and with the adapter."""

    library: str
    plain: list[Tensor]
    adapted: list[Tensor]


def reference_logits(
    adapter: Path,
    model: str,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
) -> Reference:
    """Loads the model anew; raises FailedPrecondition where the library is missing or refuses."""
    library = read_manifest(adapter).library
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, attn_implementation="eager", trust_remote_code=False
    )
    loaded = loaded.to(device).eval()
    plain = _logits(loaded, prompts)
    if library == "deltamux":
        reconstruct(loaded, adapter)
        return Reference("dense reconstruction", plain, _logits(loaded, prompts))
    words, adapted = _by_peft(loaded, adapter, library)
    return Reference(words, plain, _logits(adapted, prompts))


def _by_peft(
    model: PreTrainedModel, adapter: Path, library: Library
) -> tuple[str, PreTrainedModel]:
    if library != "peft":
        raise FailedPrecondition(
            f"adapters of {library} are not verified: its library does not run beside deltamux's "
            "version of transformers"
        )
    try:
        import peft
    except ImportError:
        raise FailedPrecondition(
            "PEFT is not installed, and the adapter is compared with it: "
            "pip install 'deltamux[verify]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FailedPrecondition(f"PEFT cannot load the adapter: {first_line}") from None
    return f"PEFT {peft.__version__}", adapted


@torch.inference_mode()
def _logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    device = model.device
    # PEFT may give logits for virtual tokens too, in front.
    return [
        model(input_ids=torch.tensor([prompt], device=device))
        .logits[0, -len(prompt) :]
        .float()
        .cpu()
        for prompt in prompts
    ]
