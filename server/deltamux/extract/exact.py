"""Ways to store a changed parameter without loss; the smallest is taken."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from deltamux.adapters.checkpoint import delta_format as words
from deltamux.extract.forms import Parts, size_of, sparse_parts

# Numbers of a linear weight may be stored one by one, those of a table row by row.
Use = Literal["linear", "table", "whole"]


def exact_parts(value: Tensor, before: Tensor | None, use: Use) -> tuple[str, Parts]:
    """What the form is called in a report, and the parts: the whole value or what changed of it."""
    parts: Parts = {}
    if before is not None and use == "linear":
        parts = _changed_numbers(value, before)
    elif before is not None and use == "table":
        parts = _changed_rows(value, before)
    name = "exact numbers" if use == "linear" else "exact rows"
    return (name, parts) if parts else ("exact", {words.VALUE: value})


def _changed_numbers(value: Tensor, before: Tensor) -> Parts:
    """Empty where the value takes no more, or is not the float32 sum of base and change."""
    changed = value != before
    # A float32 and a column a number.
    if 8 * int(changed.sum()) >= size_of({"": value}) or not changed.any():
        return {}
    delta = value.float() - before.float()
    parts = sparse_parts(delta, changed, torch.float32)
    lossless = torch.equal(before.float() + delta, value.float())
    return parts if lossless and size_of(parts) < size_of({"": value}) else {}


def _changed_rows(value: Tensor, before: Tensor) -> Parts:
    ids = (value != before).any(1).nonzero().flatten()
    parts = {words.ROW_IDS: ids.int(), words.ROW_VALUES: value[ids]}
    return parts if 0 < size_of(parts) < size_of({"": value}) else {}
