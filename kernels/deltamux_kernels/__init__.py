"""Kernels of deltamux: one formula an op, in Triton for CUDA and in plain torch elsewhere."""

from deltamux_kernels._triton import start_launcher
from deltamux_kernels.activate import Activations, activate
from deltamux_kernels.attention_batch import AttentionBatch
from deltamux_kernels.block_rotate import block_rotate
from deltamux_kernels.captured_attention import CapturedAttention
from deltamux_kernels.captured_segments import CapturedSegments
from deltamux_kernels.embedding_shrink import embedding_shrink
from deltamux_kernels.expand import Columns, expand
from deltamux_kernels.expand_slices import Slice, expand_slices
from deltamux_kernels.gated_silu import gated_silu
from deltamux_kernels.grouped_dense import dense_delta, grouped_dense
from deltamux_kernels.packed import ALIGNMENT, PackedMatrices
from deltamux_kernels.paged_attention import paged_attention
from deltamux_kernels.pair_rotate import PairFactors, pair_rotate
from deltamux_kernels.rms_norm import rms_norm
from deltamux_kernels.rotary import rotary
from deltamux_kernels.row_affine import row_affine
from deltamux_kernels.row_bias import row_bias
from deltamux_kernels.row_norm import NormForm, row_norm
from deltamux_kernels.segments import Segments
from deltamux_kernels.shrink import Shrunk, shrink
from deltamux_kernels.sign_delta import SignMatrices, sign_delta
from deltamux_kernels.sparse_delta import SparseMatrices, sparse_delta
from deltamux_kernels.staged import Staged
from deltamux_kernels.token_rows import TokenTable, token_columns, token_rows
from deltamux_kernels.write_kv import write_kv

__all__ = [
    "ALIGNMENT",
    "Activations",
    "AttentionBatch",
    "CapturedAttention",
    "CapturedSegments",
    "Columns",
    "NormForm",
    "PackedMatrices",
    "PairFactors",
    "Segments",
    "Shrunk",
    "SignMatrices",
    "Slice",
    "SparseMatrices",
    "Staged",
    "TokenTable",
    "activate",
    "block_rotate",
    "dense_delta",
    "embedding_shrink",
    "expand",
    "expand_slices",
    "gated_silu",
    "grouped_dense",
    "paged_attention",
    "pair_rotate",
    "rms_norm",
    "rotary",
    "row_affine",
    "row_bias",
    "row_norm",
    "shrink",
    "sign_delta",
    "sparse_delta",
    "start_launcher",
    "token_columns",
    "token_rows",
    "write_kv",
]
