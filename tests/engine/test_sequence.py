import pytest

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.adapters.traits import Traits


@pytest.mark.parametrize(
    ("first", "count", "ids"),
    [
        (0, 2, [-1, -2]),
        (0, 5, [-1, -2, -3, 0, 1]),
        (1, 3, [-2, -3, 0]),
        (2, 1, [-3]),
        (3, 2, [0, 1]),
        (5, 2, [2, 3]),
    ],
)
def test_ids_of_places(new_sequence, first, count, ids):
    sequence = new_sequence(num_prompt=4)
    sequence.begin_with(Traits(Virtual(3)))
    assert sequence.ids(first, count) == ids
    assert (sequence.num_places, sequence.num_uncomputed) == (7, 7)


def test_ids_are_tokens_where_nothing_is_virtual(new_sequence):
    assert new_sequence(num_prompt=5).ids(1, 3) == [1, 2, 3]
