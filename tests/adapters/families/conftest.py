"""Adapters that are broken in one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from deltamux.adapters.files import CONFIG
from deltamux.errors import DeltamuxError

Tensors = dict[str, Tensor]


@pytest.fixture
def refusal(serve: Callable[..., Any], rewrite: Callable[..., Path]) -> Callable[..., Any]:
    """refusal(name, folder, change, **fields) -> why the adapter is refused with its tensors
    changed so and these fields in its config."""

    def refusal(
        name: str,
        folder: Path,
        change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
        **fields: object,
    ) -> DeltamuxError:
        copied = rewrite(folder, change)
        config = json.loads((copied / CONFIG).read_text())
        (copied / CONFIG).write_text(json.dumps({**config, **fields}))
        with pytest.raises(DeltamuxError) as caught:
            serve(name).parse(copied)
        return caught.value

    return refusal
