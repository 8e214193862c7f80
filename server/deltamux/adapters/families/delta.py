"""deltamux's own format, docs/formats.md: the parameters that a fine-tune changed, whole or as low
rank, sparse or one-bit changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deltamux.adapters.checkpoint import delta_format as words
from deltamux.adapters.checkpoint.fields import Fields, as_integer
from deltamux.adapters.checkpoint.manifest import Manifest
from deltamux.adapters.checkpoint.strict_json import Json
from deltamux.adapters.family import Parsed
from deltamux.adapters.payloads.base_fit import is_copy, other_base
from deltamux.adapters.payloads.replacement import replacement
from deltamux.adapters.payloads.rounding import to_serving
from deltamux.adapters.peft.module_tensors import ModuleTensors, Names
from deltamux.adapters.peft.trained_tokens import token_payload
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.norm_parameters import NormParameters
from deltamux.adapters.primitives.payload import Payload
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.adapters.primitives.sign_delta import SignDelta
from deltamux.adapters.primitives.sparse_delta import SparseDelta
from deltamux.base.structure import SiteSpec, Structure
from deltamux.errors import FailedPrecondition, InvalidArgument

_WEIGHT_PARTS = tuple(f"weight.{part}" for part in words.PARTS)
_PARTS = (*_WEIGHT_PARTS, f"bias.{words.VALUE}", f"bias.{words.SAMPLE}")
_INTEGERS = tuple(f"weight.{part}" for part in words.INTEGERS)

# What does not change what the adapter computes.
_HARMLESS = ("base_model_name_or_path", "form")


# Different token ids, and a row for each.
_Tokens = tuple[list[int], Tensor]


class Delta:
    """A full fine-tune beside its base, and whatever else comes down to changed parameters."""

    name = "delta"

    def claims(self, manifest: Manifest) -> bool:
        return (manifest.library, manifest.type) == ("deltamux", words.TYPE)

    def parse(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        structure: Structure,
        dtype: torch.dtype,
    ) -> Parsed:
        _check_config(manifest.fields)
        modules = ModuleTensors(tensors, structure, Names(_PARTS, _INTEGERS), prefix="")
        reader = _Reader(modules, structure, dtype)
        payloads = {site.name: tuple(reader.payloads(site)) for site in structure.sites.values()}
        modules.require_none_left()
        return Parsed(
            {name: payload for name, payload in payloads.items() if payload},
            rank=reader.rank,
            parameters=reader.parameters,
        )


def _check_config(values: Mapping[str, Json]) -> None:
    fields = Fields(values)
    as_integer("version", fields.take("version"), words.VERSION, words.VERSION)
    fields.discard(_HARMLESS)
    fields.require_none_left()


class _Reader:
    """Turns the parts of each module into payloads in the serving dtype."""

    def __init__(self, modules: ModuleTensors, structure: Structure, dtype: torch.dtype) -> None:
        self._modules = modules
        self._structure = structure
        self._dtype = dtype
        # What the embeddings have of their own, for a head that is tied to them.
        self._shared: tuple[Tensor | None, _Tokens | None] = (None, None)
        self.rank = 0
        self.parameters = 0

    def payloads(self, site: SiteSpec) -> Iterator[Payload]:
        self._check_base(site)
        value = self._take(site, words.VALUE, 1 if site.kind == "norm" else 2)
        bias = self._modules.take_if_any(site.name, f"bias.{words.VALUE}", 1)
        self._count(value, bias)
        if bias is not None and bias.shape[0] != site.out_features:
            raise other_base(site, f"bias of {tuple(bias.shape)}")
        if site.kind == "norm":
            yield from self._norm(site, value, bias)
            return
        tokens = self._tokens(site)
        changes = [] if site.kind == "embedding" else list(self._changes(site))
        if site.name == self._structure.embedding and self._structure.tied:
            self._shared = (value, tokens)
        unchanged = value is None and tokens is None and not changes
        if unchanged and site.name == self._structure.head:
            value, tokens = self._shared
        if (value is not None) + (tokens is not None) + bool(changes) > 1:
            raise _conflict(site)
        if value is not None:
            own = self._structure.host_bias(site.name) if bias is None else bias
            yield replacement(site, value, own, self._structure, self._dtype)
            return
        if tokens is not None:
            yield token_payload(site.name, *tokens, self._structure, self._dtype)
        yield from changes
        if bias is not None:
            yield self._shift(site, bias)

    def _norm(
        self, site: SiteSpec, weight: Tensor | None, bias: Tensor | None
    ) -> Iterator[Payload]:
        base = self._structure.host_bias(site.name)
        if bias is not None and base is None:
            yield RowBias(to_serving(site, bias, self._dtype))
            bias = None
        if weight is None and bias is None:
            return
        vectors = [self._structure.host_weight(site.name) if weight is None else weight]
        if base is not None:
            vectors.append(base if bias is None else bias)
        if vectors[0].shape[0] != site.out_features:
            raise other_base(site, f"weight of {tuple(vectors[0].shape)}")
        yield NormParameters(*(to_serving(site, v, self._dtype) for v in vectors))

    def _shift(self, site: SiteSpec, bias: Tensor) -> RowBias:
        base = self._structure.host_bias(site.name)
        shift = bias.float() if base is None else bias.float() - base
        return RowBias(to_serving(site, shift, self._dtype))

    def _tokens(self, site: SiteSpec) -> _Tokens | None:
        """Tokens with rows of their own; they fit an embedding or a head."""
        if site.kind == "linear" or (rows := self._take(site, words.ROW_VALUES, 2)) is None:
            return None
        ids = self._need(site, words.ROW_IDS, 1).tolist()
        if min(ids) < 0 or len(set(ids)) < len(ids):
            raise InvalidArgument(
                f"{site.name}: {words.ROW_IDS} are not different tokens", reason="MALFORMED_WEIGHTS"
            )
        self._count(rows)
        return ids, rows

    def _changes(self, site: SiteSpec) -> Iterator[Payload]:
        """What is added to the base's weight."""
        if (a := self._take(site, words.LOW_RANK_A, 2)) is not None:
            yield self._low_rank(site, a, self._need(site, words.LOW_RANK_B, 2))
        if (values := self._take(site, words.SPARSE_VALUES, 1)) is not None:
            yield self._sparse(site, values)
        if (signs := self._take(site, words.SIGNS, 2)) is not None:
            yield self._one_bit(site, signs)

    def _low_rank(self, site: SiteSpec, a: Tensor, b: Tensor) -> LowRank:
        rank = a.shape[0]
        if (a.shape[1], *b.shape) != (site.in_features, site.out_features, rank):
            raise other_base(site, f"a of {tuple(a.shape)} and b of {tuple(b.shape)}")
        self.rank = max(self.rank, rank)
        self._count(a, b)
        return LowRank(to_serving(site, a, self._dtype), to_serving(site, b.T, self._dtype))

    def _sparse(self, site: SiteSpec, values: Tensor) -> SparseDelta:
        columns = self._need(site, words.SPARSE_COLUMNS, 1)
        starts = self._need(site, words.SPARSE_STARTS, 1)
        self._check_shape(site, words.SPARSE_SHAPE)
        number = values.shape[0]
        rising = bool((starts[1:] >= starts[:-1]).all())
        if (
            columns.shape[0] != number
            or starts.shape[0] != site.out_features + 1
            or (int(starts[0]), int(starts[-1]), rising) != (0, number, True)
            or not bool(((columns >= 0) & (columns < site.in_features)).all())
        ):
            raise InvalidArgument(
                f"{site.name}: the sparse parts do not place {number} numbers by row",
                reason="MALFORMED_WEIGHTS",
            )
        self._count(values)
        return SparseDelta(to_serving(site, values, self._dtype), columns.int(), starts.int())

    def _one_bit(self, site: SiteSpec, signs: Tensor) -> SignDelta:
        scale = self._need(site, words.SIGN_SCALE, 1)
        self._check_shape(site, words.SIGN_SHAPE)
        shape = (site.out_features, -(-site.in_features // 32))
        if signs.shape != shape or signs.dtype is not torch.int32 or scale.shape != (1,):
            raise InvalidArgument(
                f"{site.name}: signs of {tuple(signs.shape)} in {signs.dtype} with scale of "
                f"{tuple(scale.shape)} are not {shape} in torch.int32 with one scale",
                reason="MALFORMED_WEIGHTS",
            )
        self.parameters += site.out_features * site.in_features + 1
        return SignDelta(signs.contiguous(), scale.float())

    def _check_shape(self, site: SiteSpec, part: str) -> None:
        shape = self._need(site, part, 1).tolist()
        if shape != [site.out_features, site.in_features]:
            raise other_base(site, f"changes of a weight of {shape}")

    def _check_base(self, site: SiteSpec) -> None:
        """Compares the numbers of the base that the file knows with the ones of this base."""
        parameters = {"weight": self._structure.weight, "bias": self._structure.bias}
        for name, read in parameters.items():
            sample = self._modules.take_if_any(site.name, f"{name}.{words.SAMPLE}", 1)
            if sample is None:
                continue
            base = read(site.name)
            if base is None or not is_copy(sample, words.base_sample(base)):
                raise FailedPrecondition(
                    f"{site.name}: the {name} of this base is not the one that the adapter was "
                    "made beside",
                    reason="BASE_MISMATCH",
                )

    def _take(self, site: SiteSpec, part: str, dimensions: int) -> Tensor | None:
        return self._modules.take_if_any(site.name, f"weight.{part}", dimensions)

    def _need(self, site: SiteSpec, part: str, dimensions: int) -> Tensor:
        return self._modules.take(site.name, f"weight.{part}", dimensions)

    def _count(self, *trained: Tensor | None) -> None:
        self.parameters += sum(tensor.numel() for tensor in trained if tensor is not None)


def _conflict(site: SiteSpec) -> InvalidArgument:
    return InvalidArgument(
        f"{site.name} has a weight or rows of its own and changes of the base's; one alone holds",
        reason="EXTRA_TENSORS",
    )
