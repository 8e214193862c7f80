import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.engine.block_allocator import BlockAllocator


def test_block_0_is_never_handed_out():
    allocator = BlockAllocator(5)
    assert allocator.num_total == allocator.num_free == 4
    assert sorted(allocator.allocate(4)) == [1, 2, 3, 4]
    assert allocator.num_free == 0


def test_a_shared_block_is_free_only_after_its_last_reference():
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(2)
    allocator.share(blocks[:1])
    allocator.free(blocks)
    assert allocator.num_free == 1
    assert allocator.allocate(1) == blocks[1:]
    allocator.free(blocks[:1])
    assert allocator.allocate(1) == blocks[:1]


def test_more_than_there_are_is_refused_and_takes_nothing():
    allocator = BlockAllocator(3)
    with pytest.raises(ValueError, match="3 blocks wanted, 2 free"):
        allocator.allocate(3)
    assert allocator.num_free == 2


@pytest.mark.parametrize("verb", ["free", "share"])
@pytest.mark.parametrize("block", [0, 1])
def test_a_block_that_is_not_held_is_a_bug(verb, block):
    allocator = BlockAllocator(3)
    with pytest.raises(ValueError, match=f"block {block} is not held"):
        getattr(allocator, verb)([block])


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 6))))
def test_blocks_are_conserved_and_never_handed_out_twice(operations):
    """Against a plain list of references held."""
    allocator = BlockAllocator(8)
    held: list[int] = []
    for verb, number in operations:
        if verb == "allocate" and number <= allocator.num_free:
            blocks = allocator.allocate(number)
            assert not set(blocks) & set(held)
            held += blocks
        elif verb == "share" and held:
            block = held[number % len(held)]
            allocator.share([block])
            held.append(block)
        elif verb == "free" and held:
            allocator.free([held.pop(number % len(held))])
        assert allocator.num_free == 7 - len(set(held))
