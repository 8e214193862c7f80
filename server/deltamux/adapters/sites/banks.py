"""Builds the banks of each site; sites that read one input get one shared store for their A."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.adapters.primitives.added_tokens import (
    AddedColumnsBank,
    AddedEmbeddingBank,
    AddedTokens,
)
from deltamux.adapters.primitives.block_rotation import (
    InputRotation,
    InputRotationBank,
    OutputRotation,
    OutputRotationBank,
)
from deltamux.adapters.primitives.bottleneck import (
    BottleneckBank,
    OutputBottleneck,
    Read,
    Residual,
    ResidualBottleneck,
    SumBottleneck,
    read_output,
    read_residual,
    read_sum,
)
from deltamux.adapters.primitives.dense import (
    Dense,
    DenseBank,
    DenseDelta,
    DenseDeltaBank,
    DenseEmbedding,
    DenseEmbeddingBank,
)
from deltamux.adapters.primitives.embedding_low_rank import EmbeddingLowRank, EmbeddingLowRankBank
from deltamux.adapters.primitives.expert_low_rank import ExpertLowRankBank
from deltamux.adapters.primitives.input_scale import InputScale, InputScaleBank
from deltamux.adapters.primitives.low_rank import LowRank, LowRankBank, SharedInput
from deltamux.adapters.primitives.norm_parameters import (
    CopiedNormBank,
    NormParameters,
    NormParametersBank,
)
from deltamux.adapters.primitives.pair_rotation import PairRotation, PairRotationBank
from deltamux.adapters.primitives.payload import Bank, Payload
from deltamux.adapters.primitives.row_bias import RowBias, RowBiasBank
from deltamux.adapters.primitives.row_scale import OutputScale, RowScale, RowScaleBank
from deltamux.adapters.primitives.sign_delta import SignDelta, SignDeltaBank
from deltamux.adapters.primitives.sparse_delta import SparseDelta, SparseDeltaBank
from deltamux.adapters.primitives.task_head import TaskHeadBank
from deltamux.adapters.primitives.token_rows import EmbeddingTokenBank, HeadTokenBank, TokenRows
from deltamux.adapters.primitives.virtual_tokens import (
    KeyValuePrefix,
    KeyValuePrefixBank,
    VirtualTokens,
    VirtualTokensBank,
)
from deltamux.base.experts import Experts
from deltamux.base.norm_form import find_norm_form
from deltamux.base.structure import SiteSpec, Structure
from deltamux_kernels import native
from deltamux_kernels.expand import Columns
from deltamux_kernels.packed import DividedMatrices, PackedMatrices
from deltamux_kernels.pair_rotate import PairFactors
from deltamux_kernels.sign_delta import SignMatrices
from deltamux_kernels.sparse_delta import SparseMatrices
from deltamux_kernels.token_rows import TokenTable

# Of one site, in the order in which they act.
Banks = dict[type[Payload], Bank]


class BankFactory:
    """Knows the arena and the groups of one model."""

    def __init__(self, arena: Tensor, slots: int, structure: Structure) -> None:
        self._arena = arena
        self._slots = slots
        self._structure = structure
        # Compiled now, not in somebody's first step.
        self.uses_c = arena.dtype == torch.float32 and not arena.is_cuda and native.available()
        self.prefixes = self._prefixes()
        self._shared: dict[int, SharedInput] = {}
        self._last_of_groups = {names[-1] for names in structure.groups}
        self._residual = Residual()
        self._residuals = {sublayer.residual for sublayer in structure.sublayers.values()}

    def banks(self, spec: SiteSpec) -> Banks:
        """Empty banks for all primitives that a site of this kind can have."""
        if spec.kind == "embedding":
            return self._embedding(spec)
        return self._norm(spec) if spec.kind == "norm" else self._linear(spec)

    def residual(self, spec: SiteSpec) -> Residual | None:
        """Where the site leaves its input, if that is the residual of a sublayer."""
        return self._residual if spec.name in self._residuals else None

    def experts(self, experts: Experts, projection: str) -> ExpertLowRankBank:
        """The empty bank of one layer of a mixture of experts."""
        out_features, in_features = experts.weight(projection).shape[1:]
        columns = Columns(self._slots * experts.count, self._arena.device)
        a, b = (
            DividedMatrices(self._arena, self._slots, width, experts.count)
            for width in (in_features, out_features)
        )
        return ExpertLowRankBank(a, b, columns)

    def task_heads(self) -> TaskHeadBank:
        """The empty bank of what adapters put in place of the language head."""
        return TaskHeadBank(self._store(self._structure.task_heads.width), self._store(1))

    def _norm(self, spec: SiteSpec) -> Banks:
        return {
            NormParameters: self._norm_parameters(spec),
            RowBias: RowBiasBank(self._store(spec.out_features)),
        }

    def _norm_parameters(self, spec: SiteSpec) -> NormParametersBank | CopiedNormBank:
        norm = self._structure.module(spec.name)
        form = find_norm_form(norm)
        if form is None:
            return CopiedNormBank(norm, spec, self._host_store(spec.out_features))
        return NormParametersBank(form, spec, self._store(spec.out_features))

    def _embedding(self, spec: SiteSpec) -> Banks:
        a, b = self._store(spec.in_features), self._store(spec.out_features)
        banks: Banks = {
            DenseEmbedding: DenseEmbeddingBank(self._store(spec.out_features)),
            TokenRows: EmbeddingTokenBank(self._tokens(spec.out_features)),
            EmbeddingLowRank: EmbeddingLowRankBank(a, b, self._columns()),
            RowScale: RowScaleBank(self._store(spec.out_features), None),
            OutputRotation: OutputRotationBank(self._store(spec.out_features)),
        }
        if spec.name == self._structure.embedding:
            virtual, added = (self._tokens(spec.out_features) for _ in range(2))
            banks[VirtualTokens] = VirtualTokensBank(virtual)
            banks[AddedTokens] = AddedEmbeddingBank(added, spec.in_features)
            banks[KeyValuePrefix] = self.prefixes
        return banks

    def _linear(self, spec: SiteSpec) -> Banks:
        shared = self._shared_input(spec)
        last = spec.group is None or spec.name in self._last_of_groups
        bias = self._structure.bias(spec.name)
        b = self._low_rank_store(spec.out_features)
        banks: Banks = {
            InputScale: InputScaleBank(self._store(spec.in_features)),
            InputRotation: InputRotationBank(self._store(spec.in_features)),
            Dense: DenseBank(self._store(spec.in_features), self._store(spec.out_features)),
            TokenRows: HeadTokenBank(self._tokens(spec.in_features)),
            DenseDelta: DenseDeltaBank(self._store(spec.in_features)),
            LowRank: LowRankBank(shared, last, b, self._columns()),
            SparseDelta: SparseDeltaBank(self._sparse(spec)),
            SignDelta: SignDeltaBank(self._signs(spec)),
            RowScale: RowScaleBank(self._store(spec.out_features), bias),
            RowBias: RowBiasBank(self._store(spec.out_features)),
            OutputScale: RowScaleBank(self._store(spec.out_features), None),
            PairRotation: PairRotationBank(self._pair_factors(spec)),
            **self._bottlenecks(spec),
        }
        if spec.kind == "head":
            banks[AddedTokens] = AddedColumnsBank(self._tokens(spec.in_features))
        return banks

    def _bottlenecks(self, spec: SiteSpec) -> Banks:
        """Those at the end of a sublayer; elsewhere there are none."""
        sublayer = self._structure.sublayers.get(spec.name)
        if sublayer is None:
            return {}
        norm = None if sublayer.norm is None else self._structure.module(sublayer.norm)
        reads: dict[type[Payload], Read] = {
            OutputBottleneck: read_output,
            ResidualBottleneck: read_residual,
            SumBottleneck: read_sum(norm),
        }
        hidden = spec.out_features
        return {
            payload: BottleneckBank(self._arena, self._slots, hidden, self._residual, read)
            for payload, read in reads.items()
        }

    def _shared_input(self, spec: SiteSpec) -> SharedInput:
        if spec.group is None:
            return SharedInput(self._low_rank_store(spec.in_features), spec.in_features)
        if spec.group not in self._shared:
            a = self._low_rank_store(spec.in_features)
            self._shared[spec.group] = SharedInput(a, spec.in_features)
        return self._shared[spec.group]

    def _prefixes(self) -> KeyValuePrefixBank:
        """As wide as the first layer: a prefix is refused where the layers differ."""
        layers = self._structure.layers
        width = layers[0].kv_heads * layers[0].key_dim if layers else 1
        return KeyValuePrefixBank(self._store(width), len(layers))

    def _store(self, width: int) -> PackedMatrices:
        return PackedMatrices(self._arena, self._slots, width)

    def _low_rank_store(self, width: int) -> PackedMatrices:
        return PackedMatrices(self._arena, self._slots, width, halves=self.uses_c)

    def _host_store(self, width: int) -> PackedMatrices:
        """Of a bank that looks slots up on the host in every step."""
        return PackedMatrices(self._arena, self._slots, width, host_read=True)

    def _sparse(self, spec: SiteSpec) -> SparseMatrices:
        return SparseMatrices(self._arena, self._slots, spec.out_features, spec.in_features)

    def _signs(self, spec: SiteSpec) -> SignMatrices:
        return SignMatrices(self._arena, self._slots, spec.out_features, spec.in_features)

    def _tokens(self, width: int) -> TokenTable:
        return TokenTable(self._arena, self._slots, width)

    def _pair_factors(self, spec: SiteSpec) -> PairFactors:
        return PairFactors(self._arena, self._slots, spec.out_features)

    def _columns(self) -> Columns:
        return Columns(self._slots, self._arena.device)
