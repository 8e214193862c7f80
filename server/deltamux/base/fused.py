"""Puts one call in the place of many in a model's norms, gated MLPs and rotary embeddings.

For each operation on a tensor transformers calls torch: eight times for a root mean square norm in
16 bits, ten times for a rotary embedding. On a GPU each is a kernel; on a CPU it takes longer to
call than to compute for a few rows. Only the modules of one model change, and only their class, to
a subclass: names, parameters and what a module is an instance of stay, and no other model of the
process notices. A module is left alone where its own form computes something else on random input.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from deltamux.base.agreement import agree, random_rows
from deltamux.base.norm_form import find_norm_form
from deltamux_kernels import NormForm, gated_silu, native, rms_norm, rotary

_log = logging.getLogger(__name__)

_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ROTARY = "apply_rotary_pos_emb"


def can_fuse(like: Tensor) -> bool:
    """Whether the forms of such tensors are other than torch's operations one by one."""
    if like.device.type == "cuda":
        return True
    return like.dtype == torch.float32 and native.available()


def fuse(model: PreTrainedModel) -> Counter[str]:
    """Fuses what it can of a model that is ready to run; returns how many modules of each kind."""
    embedding = model.get_input_embeddings().weight
    fused: Counter[str] = Counter()
    with torch.inference_mode():
        for kind, fuse_module in _KINDS.items():
            fused[kind] = sum(fuse_module(module, embedding) for module in model.modules())
    _log.info("fused %s", ", ".join(f"{count} {kind}" for kind, count in fused.items()))
    return fused


def _fuse_norm(norm: Any, like: Tensor) -> bool:
    """A norm of one of the forms of `rms_norm`."""
    own: Any = type(norm)
    if not own.__name__.endswith("RMSNorm") or not _reads_one_tensor(norm):
        return False
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    form = find_norm_form(norm)
    if form is None or form.centred:
        return False
    return _put(norm, _normed(own, form), random_rows(weight, 3, weight.shape[0]))


def _fuse_gated(mlp: Any, like: Tensor) -> bool:
    """An MLP whose forward reads nothing but its three linear modules and SiLU."""
    own: Any = type(mlp)
    if set(_names(own)) != _GATED or not _reads_one_tensor(mlp):
        return False
    if not isinstance(mlp.act_fn, nn.SiLU | SiLUActivation):
        return False
    return _put(mlp, _gated(own), random_rows(like, 1, 3, mlp.gate_proj.in_features))


def _fuse_rotary(attention: Any, like: Tensor) -> bool:
    """An attention that rotates by a global function, which computes what `rotary` does."""
    own: Any = type(attention)
    if _ROTARY not in _names(own) or _ROTARY not in own.forward.__globals__:
        return False
    dim = getattr(attention, "head_dim", None) or 64
    if not _is_rotary(own.forward.__globals__[_ROTARY], like, dim):
        return False
    attention.__class__ = _rotating(own)
    return True


_KINDS: dict[str, Callable[[Any, Tensor], bool]] = {
    "norms": _fuse_norm,
    "gates": _fuse_gated,
    "rotary": _fuse_rotary,
}


def _names(own: Any) -> tuple[str, ...]:
    """Attributes and globals that a class's forward reads; none where it is wrapped in another."""
    code = getattr(own.forward, "__code__", None)
    return () if code is None else code.co_names


def _reads_one_tensor(module: Any) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _put(module: Any, fused: Any, given: Tensor) -> bool:
    """Makes a module one of the class `fused`, if that agrees with its own on `given`."""
    own, expected = type(module), module(given)
    module.__class__ = fused
    if not agree(module(given), expected):
        module.__class__ = own
    return type(module) is fused


@cache
def _normed(own: Any, form: NormForm) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, form.epsilon, form.offset, form.once)

    return _subclass(own, forward)


@cache
def _gated(own: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))
        return y

    return _subclass(own, forward)


@cache
def _rotating(own: Any) -> Any:
    """The forward of `own` with another global; what transformers' module holds stays."""
    plain = own.forward
    forward = FunctionType(
        plain.__code__,
        {**plain.__globals__, _ROTARY: _rotary_or(plain.__globals__[_ROTARY])},
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    forward.__kwdefaults__ = plain.__kwdefaults__
    return _subclass(own, forward)


def _subclass(own: Any, forward: Callable[..., Any]) -> Any:
    named = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (own,), {"forward": forward, **named})


def _rotary_or(own: Callable[..., Any]) -> Callable[..., Any]:
    """`rotary` for the tensors of a step, `own` for any others, such as a part of each head."""

    def rotate(*given: Any, **options: Any) -> Any:
        fits = len(given) == 4 and not options and _are_of_a_step(*given)
        return rotary(*given) if fits else own(*given, **options)

    return rotate


def _are_of_a_step(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    one_type = query.dtype == key.dtype == cos.dtype == sin.dtype
    tokens = query.shape[2:]
    one_shape = tokens == key.shape[2:] == cos.shape[1:] == sin.shape[1:]
    return one_type and one_shape and query.shape[0] == key.shape[0] == cos.shape[0] == 1


def _is_rotary(own: Callable[..., Any], like: Tensor, dim: int) -> bool:
    """Whether a function of queries, keys, cos and sin is `rotary` to the bit."""
    parameters = inspect.signature(own).parameters.values()
    if sum(parameter.default is parameter.empty for parameter in parameters) != 4:
        return False
    heads = (random_rows(like, 1, 5, heads, dim).transpose(1, 2) for heads in (4, 2))
    # The second factor differs from the first, as cos from sin.
    given = (*heads, random_rows(like, 1, 5, dim), random_rows(like, 1, 5, dim).flip(-1))
    try:
        expected = own(*given)
    except Exception:  # it reads tensors of other shapes
        return False
    rotated = rotary(*given)
    same_dtype = all(x.dtype == like.dtype for x in expected)
    return same_dtype and all(map(torch.equal, rotated, expected))
