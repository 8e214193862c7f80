"""Compares the packed forward with plain transformers: no model is silently wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltamux.base.load import Base
from deltamux.errors import StartupError

# prompts -> rows of each, float32, computed together: logits [len(prompt), V], or an encoder's last
# hidden states [len(prompt), width].
PackedForward = Callable[[list[list[int]]], list[Tensor]]

# Largest error of a row, relative to the row. In 16 bits the mean over rows counts: the
# routing of a mixture of experts may tip over in single rows.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_LONGEST, _SHORTEST = 640, 24
# Multiplications that the longer prompt may cost.
_WORK = {"cpu": 1.5e10, "cuda": 1e13}


def self_test(base: Base, packed: PackedForward) -> None:
    """Two random prompts, one longer than any sliding window where that is affordable.

    Raises StartupError when the two forwards do not agree.
    """
    prompts = _prompts(base)
    with torch.inference_mode():
        computed = packed(prompts)
        base.set_plain_attention()
        for prompt, rows in zip(prompts, computed, strict=True):
            error = relative_error(rows, _plainly(base, prompt), base.dtype)
            if not error <= TOLERANCE[base.dtype]:
                what = "logits" if base.encoder is None else "hidden states"
                raise StartupError(
                    f"deltamux cannot serve this {base.config.model_type!r} model: its packed "
                    f"{what} differ from those of transformers by {error:.1e} (relative), "
                    f"more than {TOLERANCE[base.dtype]:.0e}",
                    reason="MODEL_UNSUPPORTED",
                )


def _prompts(base: Base) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    longest = _affordable_length(base)
    return [
        torch.randint(base.vocab_size, (length,), generator=generator).tolist()
        for length in (longest, max(1, longest // 3))
    ]


def _affordable_length(base: Base) -> int:
    windows = [layer.window for layer in base.layers if layer.window]
    wanted = max(3 * _SHORTEST, *(2 * window for window in windows), 0)
    affordable = max(_SHORTEST, int(_WORK[base.device.type] / _work_of_a_token(base)))
    return min(wanted, affordable, _LONGEST, base.max_model_len)


def _work_of_a_token(base: Base) -> int:
    """Roughly: packed layers are no parameters, and experts are no sites."""
    sites = sum(
        site.in_features * site.out_features
        for site in base.structure.sites.values()
        if site.kind != "norm"
    )
    others = sum(int(parameter.numel()) for parameter in base.model.parameters())
    return sites + others


def _plainly(base: Base, prompt: list[int]) -> Tensor:
    ids = torch.tensor([prompt], device=base.device)
    if base.encoder is None:
        rows: Tensor = base.model(input_ids=ids, use_cache=False).logits[0]
    else:
        rows = base.model.base_model(input_ids=ids).last_hidden_state[0]
    return rows.float()


def relative_error(rows: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """Of `rows` [T, V] against the same rows of a `reference`, to be held against TOLERANCE."""
    centred = reference - reference.mean(-1, keepdim=True)
    errors = (rows - reference).norm(dim=-1) / centred.norm(dim=-1)
    return float(errors.max() if dtype == torch.float32 else errors.mean())
