"""The columns of A that the tokens name, carried through expand."""

import random
from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import Columns, PackedMatrices, Segments
from deltamux_kernels.embedding_shrink import embedding_shrink_torch, embedding_shrink_triton
from deltamux_kernels.expand import expand

Pack = Callable[[list[torch.Tensor | None], int], PackedMatrices]


@pytest.mark.parametrize("seed", range(4))
def test_an_embeddings_delta_is_the_formulas(
    seed: int, form: str, dtype: torch.dtype, device: torch.device, pack: Pack
) -> None:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    vocabulary, width, ranks = pick.choice((5, 300)), pick.choice((9, 130)), (3, 0, 40, 16)

    def normal(*shape: int) -> torch.Tensor | None:
        return torch.randn(*shape).to(dtype).to(device) if all(shape) else None

    a, b = [normal(r, vocabulary) for r in ranks], [normal(r, width) for r in ranks]
    segments = Segments.build([(2, 1, 20), (1, 20, 22), (0, 23, 24), (3, 24, 25)], device)
    ids = torch.randint(vocabulary, (27,), device=device)
    y = torch.randn(27, width).to(dtype).to(device)
    expected = y.double()
    for slot, start, end in segments.spans:
        if (a_s := a[slot]) is not None and (b_s := b[slot]) is not None:
            expected[start:end] += a_s.double()[:, ids[start:end]].t() @ b_s.double()
    shrunk = embedding_shrink_torch if form == "torch" else embedding_shrink_triton
    h = shrunk(ids, pack(a, vocabulary), segments)
    expand(y, h, pack(b, width), Columns(len(ranks), device), segments)
    assert ((y - expected).abs() <= 32 * torch.finfo(dtype).eps * (1 + expected.abs())).all()
