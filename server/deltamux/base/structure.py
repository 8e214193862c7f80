"""The sites of a base model, found by watching one forward pass."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltamux.base.classifiers import find_task_heads
from deltamux.base.encoders import shared_modules
from deltamux.base.experts import Experts, find_experts
from deltamux.base.probe import AttentionLayer
from deltamux.base.sublayers import Sublayer, find_sublayers
from deltamux.base.task_heads import TaskHeads
from deltamux.base.trace import Call, is_linear, is_norm, trace

Kind = Literal["linear", "embedding", "head", "norm"]


@dataclass(frozen=True)
class SiteSpec:
    """A module that adapters may change: it maps each token row to one row.

    Sites that read the same input tensor (query, key, value; gate, up) carry the same `group`. An
    embedding has as many `in_features` as rows, a norm as many as its rows are wide. A norm of
    queries or keys maps each of a token's heads; `token_axis` says which axis of its input counts
    the tokens. `pooled` says that it is no part of the body, and is given only the rows that reach
    a head.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    group: int | None = None
    conv1d: bool = False
    embed_scale: float = 1.0
    token_axis: int | None = None
    pooled: bool = False

    def rows(self, tensor: Tensor) -> Tensor:
        """A view of the module's input or output by token: [rows, width] or [rows, heads, width].

        Where the tokens are not on the axis behind the first, there must be one sequence.
        """
        if self.token_axis is None:
            return tensor.view(-1, tensor.shape[-1])
        by_token = tensor.transpose(1, self.token_axis)
        return by_token.view(-1, *by_token.shape[2:])


class Structure:
    """All sites of a model by module name, in call order, and their frozen parameters.

    `embedding` and `head` name those of the vocabulary, `tied` says that they share one weight; an
    encoder's head is "". `task_heads` says which other heads an adapter may bring; `sublayers` are
    by the name of their output, in call order, `layers` those of attention, `experts` the mixtures
    of them by name.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteSpec],
        modules: Mapping[str, nn.Module],
        embedding: str,
        head: str,
        tied: bool,
        task_heads: TaskHeads,
        sublayers: Iterable[Sublayer] = (),
        model_type: str = "",
        layers: Iterable[AttentionLayer] = (),
        registered: Mapping[str, Kind] | None = None,
        experts: Iterable[Experts] = (),
    ) -> None:
        self.sites = dict(sites)
        # Linear modules and embeddings, sites or not, in the order in which the model holds them.
        self.registered = dict(registered or {name: site.kind for name, site in sites.items()})
        self.experts = {mixture.name: mixture for mixture in experts}
        self.embedding = embedding
        self.head = head
        self.tied = tied
        self.task_heads = task_heads
        self.sublayers = {sublayer.output: sublayer for sublayer in sublayers}
        self.model_type = model_type
        self.layers = tuple(layers)
        # Of a checkpoint's own, behind the last one of the base.
        self.added_tokens = 0
        self._modules = dict(modules)

    @property
    def groups(self) -> list[list[str]]:
        """Sites that read one input, each group in call order."""
        members: defaultdict[int, list[str]] = defaultdict(list)
        for site in self.sites.values():
            if site.group is not None:
                members[site.group].append(site.name)
        return list(members.values())

    def has_site(self, name: str) -> bool:
        """Whether it is a site, be it left out of `sites` or not."""
        return name in self._modules

    def without(self, names: Collection[str]) -> Structure:
        """The same model with fewer sites; parameters of all of them can still be read."""
        less = copy.copy(self)
        less.sites = {name: site for name, site in self.sites.items() if name not in names}
        return less

    def headless(self) -> Structure:
        """The same model without the head of the vocabulary."""
        less = self.without((self.head,))
        less.head, less.tied = "", False
        return less

    def with_added(self, tokens: int) -> Structure:
        """The same model for a checkpoint that knows so many tokens more, or fewer."""
        more = copy.copy(self)
        more.added_tokens = tokens
        return more

    def weight(self, name: str) -> Tensor:
        """Weight of a site, [out, in]; of an embedding [in, out]; of a norm [out]. Read only."""
        weight = self._modules[name].weight
        assert isinstance(weight, Tensor)
        return weight.T if self.sites[name].conv1d else weight

    def host_weight(self, name: str) -> Tensor:
        """A copy of a weight, in the same shape, as float32 on the host."""
        return self.weight(name).detach().float().cpu()

    def bias(self, name: str) -> Tensor | None:
        """Bias of a site, [out], or None."""
        bias = getattr(self._modules[name], "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def host_bias(self, name: str) -> Tensor | None:
        """A copy of a bias as float32 on the host, or None."""
        bias = self.bias(name)
        return None if bias is None else bias.detach().float().cpu()

    def module(self, name: str) -> nn.Module:
        """The base's own module of a site. Read only."""
        return self._modules[name]

    def replace(self, name: str, module: nn.Module) -> None:
        """Reads a site's parameters, which are the same, from another module from now on."""
        self._modules[name] = module


def find_structure(model: PreTrainedModel, layers: Iterable[AttentionLayer] = ()) -> Structure:
    """Runs one short forward of a transformers model and returns its sites.

    A linear module is a site when it was called once per token; the rows that a mixture of experts
    sends to one expert are not. Embeddings are sites when they take nothing but token or position
    ids, norms when they scale token rows or all heads of them. The probe has found the `layers`.
    """
    calls = trace(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    groups = _groups([call for call in calls if call.module is not head])
    sites = {call.name: _site(call, head, groups.get(call.name)) for call in calls}
    shared = shared_modules(model)
    names = {module: name for name, module in model.named_modules()}
    width = calls[-1].output.shape[-1] if head is None else head.weight.shape[1]
    return Structure(
        sites=sites | {name: _pooled_site(name, module) for name, module in shared.items()},
        modules={call.name: call.module for call in calls} | shared,
        embedding=names[embedding],
        head="" if head is None else names[head],
        tied=head is not None and bool(model.config.get_text_config().tie_word_embeddings),
        task_heads=find_task_heads(model, width),
        sublayers=find_sublayers(calls),
        model_type=model.config.model_type,
        layers=layers,
        registered=_registered(model, head),
        experts=find_experts(model),
    )


def _registered(model: PreTrainedModel, head: nn.Module | None) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            kinds[name] = "head" if module is head else "linear"
        elif isinstance(module, nn.Embedding):
            kinds[name] = "embedding"
    return kinds


def _groups(calls: list[Call]) -> dict[str, int]:
    """The group of each linear that shares its input with a sibling, by its name.

    They read the same numbers: an input that is changed in between counts as another one.
    """
    keys = {
        call.name: (call.name.rpartition(".")[0], id(call.input), call.version)
        for call in calls
        if is_linear(call.module)
    }
    sizes = Counter(keys.values())
    numbers = {key: number for number, key in enumerate(k for k in sizes if sizes[k] > 1)}
    return {name: numbers[key] for name, key in keys.items() if key in numbers}


def _site(call: Call, head: nn.Module | None, group: int | None) -> SiteSpec:
    weight = call.module.weight
    assert isinstance(weight, Tensor)
    if isinstance(call.module, nn.Embedding):
        rows, width = weight.shape
        scale = float(getattr(call.module, "embed_scale", 1.0))
        return SiteSpec(call.name, "embedding", rows, width, embed_scale=scale)
    if is_norm(call.module):
        width = weight.shape[0]
        return SiteSpec(call.name, "norm", width, width, token_axis=call.token_axis)
    conv1d = isinstance(call.module, Conv1D)
    fan_in, fan_out = weight.shape if conv1d else reversed(weight.shape)
    kind: Kind = "head" if call.module is head else "linear"
    return SiteSpec(call.name, kind, fan_in, fan_out, group, conv1d)


def _pooled_site(name: str, module: nn.Module) -> SiteSpec:
    weight = module.weight
    assert isinstance(weight, Tensor)
    kind: Kind = "norm" if is_norm(module) else "linear"
    return SiteSpec(name, kind, weight.shape[-1], weight.shape[0], pooled=True)
