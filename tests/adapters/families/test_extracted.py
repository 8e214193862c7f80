"""A real fine-tune kept close to its base, extracted in every form and served in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamux.extract.forms import Form
from deltamux.extract.reconstruct import reconstruct
from deltamux.extract.run import extract

Make = Callable[..., Any]

FORMS = (Form("exact"), Form("low-rank", rank=4), Form("sparse"), Form("one-bit"))


def fine_tune(base: PreTrainedModel) -> PreTrainedModel:
    """Learns to count on, pulled back to where it started (L2-SP)."""
    torch.manual_seed(0)
    model = copy.deepcopy(base).train().requires_grad_(True)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(12):
        ids = (torch.randint(61, (8, 1)) + torch.arange(16)) % 61
        distance = sum((p - start[name]).square().sum() for name, p in model.named_parameters())
        loss = model(ids, labels=ids).loss + 1e-2 * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_all_forms_in_one_batch(
    name: str, base: Make, serve: Make, ids: Tensor, tmp_path: Path
) -> None:
    tuned = fine_tune(base(name))
    base(name).save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    served, models = serve(name), []
    for slot, form in enumerate(FORMS):
        folder = tmp_path / form.name
        folder.mkdir()
        extract(tmp_path / "base", tmp_path / "tuned", folder, form, lambda *_: None)
        served.load(slot, folder)
        models.append(copy.deepcopy(base(name)))
        reconstruct(models[-1], folder)
    slots = [None, *range(len(FORMS))]
    plain = served.logits(ids, [None] * 5)
    mixed = served.logits(ids, slots)
    assert torch.equal(mixed[0], plain[0])
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, tuned(ids).logits)
        for row, model in enumerate(models, start=1):
            expected = model(ids[row : row + 1]).logits[0]
            assert (expected - plain[row]).abs().max() > 0.1
            torch.testing.assert_close(mixed[row], expected, atol=1e-4, rtol=1e-5)
