"""Spans, their tiles and the pieces of a tensor that they cut out."""

import pytest
import torch

from deltamux_kernels import Segments

CPU = torch.device("cpu")


def test_neighbours_of_one_slot_become_one_span_and_empty_spans_disappear() -> None:
    segments = Segments.build([(3, 1, 4), (3, 4, 6), (1, 6, 6), (0, 6, 7), (3, 9, 10)], CPU)
    assert segments.spans == ((3, 1, 6), (0, 6, 7), (3, 9, 10))
    assert segments.slots == {0, 3}


def test_no_spans_is_false_and_has_no_tiles() -> None:
    segments = Segments.build([(2, 4, 4)], CPU)
    assert not segments
    assert segments.tiles.shape == (0, 3)
    assert segments.pieces(torch.zeros(5, 2)) == []


@pytest.mark.parametrize("spans", [[(0, 2, 4), (1, 3, 5)], [(0, 4, 2)], [(0, 4, 5), (1, 0, 2)]])
def test_overlapping_unsorted_or_reversed_spans_are_refused(
    spans: list[tuple[int, int, int]],
) -> None:
    with pytest.raises(ValueError, match="sorted and disjoint"):
        Segments.build(spans, CPU)


def test_tiles_cover_every_row_once_and_hold_at_most_sixteen() -> None:
    segments = Segments.build([(5, 3, 40), (2, 41, 57), (0, 57, 58)], CPU)
    covered = [
        (slot, row)
        for slot, start, rows in segments.tiles.tolist()
        for row in range(start, start + rows)
    ]
    assert covered == [
        (slot, row) for slot, start, end in segments.spans for row in range(start, end)
    ]
    assert segments.tiles[:, 2].max() == 16


@pytest.mark.parametrize("rows", [12, 15])
def test_pieces_are_views_of_the_rows_of_each_span(rows: int) -> None:
    x = torch.arange(rows * 2).view(rows, 2)
    segments = Segments.build([(0, 0, 1), (1, 1, 4), (0, 6, 7), (2, 7, 12)], CPU)
    for piece, (_, start, end) in zip(segments.pieces(x), segments.spans, strict=True):
        assert torch.equal(piece, x[start:end])
        assert piece.data_ptr() == x[start].data_ptr()


def test_the_spans_of_the_step_before_build_and_copy_nothing() -> None:
    first = Segments.build([(3, 0, 2), (1, 2, 3)], CPU)
    assert Segments.build(((3, 0, 2), (1, 2, 3)), CPU) is first
    assert Segments.build([(3, 0, 2), (1, 2, 4)], CPU).tiles.tolist() == [[3, 0, 2], [1, 2, 2]]
