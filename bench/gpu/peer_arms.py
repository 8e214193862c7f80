"""The operations of peers.py as arms, called as their own layers call them."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch

from gpu.arms import Arms, Nothing
from gpu.peers import Peers
from gpu.shapes import Step
from gpu.weights import SiteWeights

CHUNK = 16


class Vllm(Nothing):
    """lora_shrink and lora_expand with as many slots as adapters, and the ranks padded."""

    def __init__(self, peer: Any, sites: Sequence[SiteWeights], step: Step) -> None:
        self._peer, self._sites = peer, sites
        device, slots, most = sites[0].base.device, len(step.ranks), max(step.ranks)
        meta = peer.meta.make(slots, step.rows, device)
        meta.prepare_tensors(_slot_of_row(step, device))
        self._arguments = meta.meta_args(step.rows, True)
        self._weights = [
            ([a[:, None] for a in site.padded_a], [b[:, None] for b in site.padded_b])
            for site in sites
        ]
        self._bridge = [
            torch.empty(len(site.padded_a), step.rows, most, device=device) for site in sites
        ]

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        (a, b), bridge = self._weights[site], self._bridge[site]
        self._peer.shrink(x, a, bridge, *self._arguments, 1.0)
        self._peer.expand(bridge, b, y, *self._arguments, offset_start=0, add_inputs=True)


class Csgmv(Nothing):
    """SGLang's chunked_sgmv at its default chunk of 16 rows."""

    def __init__(self, peer: Any, sites: Sequence[SiteWeights], step: Step) -> None:
        self._peer, self._sites = peer, sites
        device, slots = sites[0].base.device, len(step.ranks)
        chunks = [
            (slot, min(CHUNK, end - row))
            for slot, start, end in step.spans
            for row in range(start, end, CHUNK)
        ]

        def int32(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        lengths = [length for _, length in chunks]
        self._batch = types.SimpleNamespace(
            max_len=CHUNK,
            num_segments=len(chunks),
            bs=len(chunks),
            use_cuda_graph=False,
            weight_indices=int32([slot for slot, _ in chunks]),
            seg_indptr=int32([0, *lengths]).cumsum(0).to(torch.int32),
            seg_lens=int32(lengths),
            lora_ranks=int32(step.ranks),
            permutation=int32(range(step.rows)),
            scalings=torch.ones(slots, device=device),
        )
        self._offsets = [_offsets(site).to(device) for site in sites]
        self._on_host = [_offsets(site) for site in sites]

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        weights, outputs = self._sites[site], self._sites[site].shape.outputs
        h = self._peer.shrink(x, weights.stacked_a, self._batch, len(outputs))
        self._peer.expand(
            h,
            weights.stacked_b,
            self._batch,
            self._offsets[site],
            max(outputs),
            y,
            self._on_host[site],
        )


class TritonV2(Nothing):
    """SGLang's triton_v2: grouped A beside the base's product, then grouped B, its sm_90 plans."""

    beside = True

    def __init__(self, peer: Any, sites: Sequence[SiteWeights], step: Step) -> None:
        self._peer, self._sites, self._step = peer, sites, step
        device, slots = sites[0].base.device, len(step.ranks)
        self._ranks = torch.tensor(step.ranks, dtype=torch.int32, device=device)
        self._scalings = torch.ones(slots, device=device)
        self._plans = [_plan(peer.plans, site, step) for site in sites]
        self._routes = [_route(peer, step, plan["block_size"], device) for plan in self._plans]
        self._geometry = [
            peer.b.slice_geometry(_offsets(site).tolist(), plan["b_tiles"]["BLOCK_SIZE_N"], device)
            for site, plan in zip(sites, self._plans, strict=True)
        ]
        self._scratch = [
            self._buffers(site, plan) for site, plan in zip(sites, self._plans, strict=True)
        ]

    def _buffers(self, site: SiteWeights, plan: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        columns, device = site.stacked_a.shape[1], site.base.device
        split = plan["a_tiles"].get("SPLIT_K", 1)
        bridge = torch.empty(self._step.rows, columns, dtype=site.base.dtype, device=device)
        partial = torch.empty(split, self._step.rows, columns, device=device)
        return bridge, partial, torch.zeros(1 << 16, dtype=torch.int32, device=device)

    def before(self, site: int, x: torch.Tensor) -> None:
        weights, plan = self._sites[site], self._plans[site]
        bridge, partial, counters = self._scratch[site]
        self._peer.a.grouped_lora_a(
            x,
            weights.stacked_a,
            bridge,
            self._routes[site],
            config=plan["a_tiles"],
            pair_input=True,
            lora_ranks=self._ranks,
            stack=len(weights.shape.outputs),
            partial=partial,
            counters=counters,
        )

    def after(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        plan, (bridge, partial, _) = self._plans[site], self._scratch[site]
        tiles = plan["a_tiles"]
        planes = tiles.get("SPLIT_K", 1) if tiles.get("SPLIT_MODE") == "planes" else 1
        self._peer.b.grouped_lora_b(
            partial if planes > 1 else bridge,
            self._sites[site].stacked_b,
            y,
            self._routes[site],
            geometry=self._geometry[site],
            config=plan["b_tiles"],
            add_inplace=True,
            zero_sentinel=False,
            lora_ranks=self._ranks,
            scalings=self._scalings,
            planes=planes,
        )


def peer_arms(peers: Peers, sites: Sequence[SiteWeights], step: Step) -> Arms:
    arms: Arms = {}
    if peers.vllm:
        arms["vLLM lora_shrink/lora_expand"] = lambda: Vllm(peers.vllm, sites, step)
    if peers.sglang:
        arms["SGLang csgmv"] = lambda: Csgmv(peers.sglang, sites, step)
        arms["SGLang triton_v2"] = lambda: TritonV2(peers.sglang, sites, step)
    return arms


def _slot_of_row(step: Step, device: torch.device) -> torch.Tensor:
    slots = [slot for slot, start, end in step.spans for _ in range(start, end)]
    return torch.tensor(slots, dtype=torch.int32, device=device)


def _offsets(site: SiteWeights) -> torch.Tensor:
    return torch.tensor([0, *site.shape.outputs], dtype=torch.int32).cumsum(0).to(torch.int32)


def _route(peer: Any, step: Step, block: int, device: torch.device) -> Any:
    """Rows sorted by slot and filled up to blocks, as its route kernels leave them."""
    pairs: list[int] = []
    buckets: list[int] = []
    for slot, start, end in step.spans:
        for row in range(start, end, block):
            rows = list(range(row, min(row + block, end)))
            pairs += rows + [step.rows] * (block - len(rows))
            buckets.append(slot)

    def int32(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return peer.route.RouteView(
        view=peer.route.RouteViewKind.ALIGNED,
        block_size=block,
        token_slots=_slot_of_row(step, device),
        group_ids=None,
        groups_per_slot=1,
        max_loras=len(step.ranks),
        maybe_sorted_pair_ids=int32(pairs),
        maybe_block_bucket_ids=int32(buckets),
        maybe_num_pairs_post_padded=int32([len(pairs)]),
    )


def _plan(rows: list[dict[str, Any]], site: SiteWeights, step: Step) -> dict[str, Any]:
    """Its first row for such a site that uses the grouped operations, or its default."""
    facts = {
        "tokens": step.rows,
        "rank": max(step.ranks),
        "out_features": sum(site.shape.outputs),
        "in_features": site.shape.width,
        "slots": len(step.ranks),
    }
    for row in rows:
        spec = row["spec"]
        if row.get("phase") not in (None, step.phase) or row.get("kinds"):
            continue
        if {spec.get("a_family", "grouped"), spec.get("b_family", "grouped")} != {"grouped"}:
            continue
        if all(
            facts[key[4:]] <= limit if key.startswith("max_") else facts[key[4:]] >= limit
            for key, limit in row.items()
            if key[:4] in ("max_", "min_") and key[4:] in facts
        ):
            return _with_defaults(spec, step)
    return _with_defaults({}, step)


def _with_defaults(spec: dict[str, Any], step: Step) -> dict[str, Any]:
    tiles = {"GROUP_SIZE_M": 8, "num_warps": 4}
    decode = step.phase == "decode"
    a = {"BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, **tiles, "num_stages": 3}
    b = {"BLOCK_SIZE_N": 128 if decode else 64, "BLOCK_SIZE_K": 64, **tiles, "num_stages": 2}
    if decode:
        a["SPLIT_K"] = 4
    else:
        b["num_warps"] = 8
    return {
        "block_size": spec.get("block_size", 16 if decode else 64),
        "a_tiles": spec.get("a_tiles", a),
        "b_tiles": spec.get("b_tiles", b),
    }
