"""Every arm against the formula in float64, and against itself."""

from __future__ import annotations

from typing import Any

import torch

from gpu.arms import Arm, Deltamux, Fused, own_arms
from gpu.consumers import consumer
from gpu.peer_arms import peer_arms
from gpu.peers import Peers
from gpu.shapes import SiteShape, Step
from gpu.weights import SiteWeights, exact


def compare_arms(
    site: SiteShape,
    step: Step,
    peers: Peers,
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row an arm: its largest error in roundings of what was summed, and whether a repeat and
    a row alone in its batch give the same bits. Of a fused one whether what the model computes next
    has the bits that it has behind an expand by itself."""
    torch.manual_seed(0)
    weights = exact(site, step, dtype, device)
    x = torch.randn(step.rows, site.width).to(dtype).to(device)
    before = torch.randn(step.rows, sum(site.outputs)).to(dtype).to(device)
    expected, summed = _formula(weights, step, x, before)
    arms = own_arms([weights], step) | peer_arms(peers, [weights], step)
    rows: list[dict[str, Any]] = []
    for name, make in list(arms.items())[1:]:
        try:
            arm = make()
            if isinstance(arm, Fused):
                same = fused_is_apart(weights, step, arm, x, before)
                rows.append({"arm": name, "as_apart": same})
                continue
            y, again = (_run(arm, x, before) for _ in range(2))
        except Exception as error:  # one arm less, and the reason in the report
            rows.append({"arm": name, "failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        ulps = ((y.double() - expected).abs() / summed).max().item() / torch.finfo(dtype).eps
        row = {"arm": name, "error_ulps": round(ulps, 3), "repeats": torch.equal(y, again)}
        if isinstance(arm, Deltamux):
            row["row_alone"] = _row_alone(weights, step, arm, x, before, y)
        rows.append(row)
    return rows


def fused_is_apart(
    weights: SiteWeights, step: Step, fused: Fused, x: torch.Tensor, before: torch.Tensor
) -> bool:
    """Whether what the model computes behind the site has the same bits either way."""

    def bits(arm: Arm) -> list[torch.Tensor]:
        torch.manual_seed(0)
        behind = consumer(weights.shape, step.rows, before)
        results = arm.consume(0, _run(arm, x, before), behind)
        return [result.contiguous().view(torch.uint8) for result in results]

    return all(map(torch.equal, bits(Deltamux([weights], step, "apart")), bits(fused)))


def _formula(
    weights: SiteWeights, step: Step, x: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    y, summed = before.double(), before.double().abs()
    for slot, start, end in step.spans:
        rows, column = x[start:end].double(), 0
        for a, b in zip(weights.padded_a, weights.padded_b, strict=True):
            down, up = a[slot].double().t(), b[slot].double().t()
            y[start:end, column : column + up.shape[1]] += rows @ down @ up
            absolute = rows.abs() @ down.abs() @ up.abs()
            summed[start:end, column : column + up.shape[1]] += absolute
            column += up.shape[1]
    return y, summed


def _run(arm: Arm, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    y = before.clone()
    arm.before(0, x)
    arm.after(0, x, y)
    return y


def _row_alone(
    weights: SiteWeights,
    step: Step,
    arm: Deltamux,
    x: torch.Tensor,
    before: torch.Tensor,
    together: torch.Tensor,
) -> bool:
    """The last row of each of the first slots, in a batch of one."""
    same = []
    for slot, start, end in step.spans[:4]:
        if start < end:
            one = Deltamux([weights], step, arm.form, spans=[(slot, 0, 1)])
            row = slice(end - 1, end)
            same.append(torch.equal(_run(one, x[row], before[row]), together[row]))
    return all(same)
