"""The attention function of an encoder's layers: each sequence of the step within itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention:
    """Every token attends to all of its own sequence. The runner says before each forward where
    sequences end."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        # By length and window, for all layers of a step.
        self._masks: dict[tuple[int, int], Tensor] = {}

    def begin(self, lengths: Sequence[int]) -> None:
        """`lengths` of the packed sequences, in order."""
        self._lengths = list(lengths)
        self._masks.clear()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """query [1, H, T, D], key and value [1, H, T, D] -> [1, T, H, D].

        A window of W lets a token see those less than W places away, on either side.
        """
        queries, keys, values = (
            heads.split_with_sizes(self._lengths, dim=2) for heads in (query, key, value)
        )
        attended = [
            scaled_dot_product_attention(
                q, k, v, attn_mask=self._mask(q, sliding_window), scale=scaling
            )
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(attended, dim=2).transpose(1, 2), None

    def _mask(self, query: Tensor, window: int | None) -> Tensor | None:
        """bool [n, n], or None where the window reaches everywhere."""
        length = query.shape[2]
        if window is None or length <= window:
            return None
        if (length, window) not in self._masks:
            places = torch.arange(length, device=query.device)
            near = (places[:, None] - places).abs() < window
            self._masks[length, window] = near
        return self._masks[length, window]
