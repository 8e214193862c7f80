"""The tiers of adapters: our words for them, and the contract's numbers."""

from __future__ import annotations

from collections.abc import Mapping

from deltamux.store.catalog.facts import TIERS
from deltamux.v1 import inference_pb2

# "" is that of the base, which has none.
NUMBERS: Mapping[str, inference_pb2.Tier] = {
    "": inference_pb2.TIER_UNSPECIFIED,
    **{name: inference_pb2.Tier.Value(f"TIER_{name.upper()}") for name in TIERS},
}
NAMES: Mapping[int, str] = {number: name for name, number in NUMBERS.items()}
