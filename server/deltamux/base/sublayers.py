"""Where a layer adds what a sublayer computed to what went around it, read off one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from deltamux.base.trace import Call, is_linear, is_norm


@dataclass(frozen=True)
class Sublayer:
    """An attention or MLP that ends in the linear site `output`, beside a residual.

    The residual is the input of the site `residual`, which is called earlier. Layers that norm
    first go on with residual + output (`norm` None); those that norm last go on with
    norm(residual + output), `norm` being the name of that site.
    """

    output: str
    residual: str
    norm: str | None


def find_sublayers(calls: Sequence[Call]) -> Iterator[Sublayer]:
    """The sublayers of all layers, in call order.

    A sublayer is found only where a norm reads, to the last bit, the sum of a linear module's
    output and of what another module read since the norm before. Layers that norm a sublayer's
    output, scale it, or run two of them side by side have none.
    """
    since_norm: list[Call] = []
    for call in calls:
        if is_norm(call.module) and call.token_axis is None:
            sublayer = _between(since_norm, call)
            if sublayer is not None:
                yield sublayer
            since_norm = []
        since_norm.append(call)


def _between(calls: Sequence[Call], norm: Call) -> Sublayer | None:
    """The sublayer that consists of the calls and whose sum `norm` reads."""
    linears = [call for call in calls if is_linear(call.module)]
    if not linears:
        return None
    output = linears[-1]
    for reader in calls[: calls.index(output)]:
        if _is_sum(norm, reader, output):
            norms_last = is_linear(reader.module)
            return Sublayer(output.name, reader.name, norm.name if norms_last else None)
    return None


def _is_sum(norm: Call, reader: Call, output: Call) -> bool:
    if not norm.input.shape == reader.input.shape == output.output.shape:
        return False
    return torch.equal(reader.input + output.output, norm.input)
