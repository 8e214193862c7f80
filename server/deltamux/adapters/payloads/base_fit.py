"""Whether tensors fit a module of the base, and whether they are the base's own."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.adapters.checkpoint.strict_json import quoted
from deltamux.base.structure import SiteSpec
from deltamux.errors import FailedPrecondition


def other_base(site: SiteSpec, what: str) -> FailedPrecondition:
    """The refusal of tensors that were trained on modules of another size, or otherwise than the
    config says."""
    return FailedPrecondition(
        f"{site.name}: {what} do not fit the config and the base model's module, "
        f"which maps {site.in_features} to {site.out_features}",
        reason="BASE_MISMATCH",
    )


def differs(name: str) -> FailedPrecondition:
    """The refusal of a tensor that is not the base's own, where nothing else is served."""
    return FailedPrecondition(
        f"{quoted(name)} differs from the base model's own; "
        "adapters that replace base weights are not served",
        reason="UNSUPPORTED_FEATURE",
    )


def refuse_added_tokens(site: SiteSpec, tokens: int) -> None:
    """Raises FailedPrecondition (ADDED_TOKENS) where an embedding or head has rows for more tokens
    than the base's, in a form other than that of a resized model that PEFT saves."""
    known = {"embedding": site.in_features, "head": site.out_features}.get(site.kind, tokens)
    if tokens > known:
        raise FailedPrecondition(
            f"{site.name} has rows for {tokens} tokens, the base model's for {known}; "
            "added tokens are served where PEFT saved both matrices of a resized model",
            reason="ADDED_TOKENS",
        )


def is_copy(copy: Tensor, base: Tensor) -> bool:
    """Whether they agree in the coarser of their two dtypes."""
    dtype = copy.dtype if base.dtype is torch.float32 else base.dtype
    return torch.equal(copy.to(dtype), base.detach().to("cpu", dtype))
