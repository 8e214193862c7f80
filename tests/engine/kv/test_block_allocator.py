import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.engine.kv.block_allocator import BlockAllocator


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


def publish(allocator, *keys):
    """A block with each of these keys, all of them free again."""
    blocks = allocator.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        allocator.publish(block, key)
    allocator.free(blocks)
    return blocks


def test_a_published_block_is_found_while_it_is_held_and_after():
    allocator = BlockAllocator(5)
    first, second = allocator.allocate(2)
    allocator.publish(first, b"1")
    allocator.publish(second, b"2")
    assert allocator.match([b"1", b"2", b"3"]) == [first, second]
    allocator.free([first, second])
    assert allocator.num_free == 4
    assert allocator.match([b"1", b"2"]) == [first, second]
    assert allocator.match([b"3", b"1"]) == []


def test_a_match_that_is_shared_is_no_longer_free():
    allocator = BlockAllocator(3)
    (block,) = publish(allocator, b"1")
    allocator.share(allocator.match([b"1"]))
    assert allocator.is_held(block)
    assert allocator.num_free == 1
    assert block not in allocator.allocate(1)
    allocator.free([block])
    assert allocator.match([b"1"]) == [block]


def test_content_is_lost_last_and_the_oldest_first():
    """A sequence gives its blocks back from the last on, so that its beginning lives longest."""
    allocator = BlockAllocator(6)
    old = publish(allocator, b"1", b"2")
    new = publish(allocator, b"3")
    without = [block for block in range(1, 6) if block not in (*old, *new)]
    assert sorted(allocator.allocate(2)) == without
    assert allocator.allocate(1) == old[1:]
    assert allocator.match([b"1", b"2"]) == old[:1]
    assert allocator.allocate(2) == [old[0], *new]
    assert allocator.match([b"1"]) == allocator.match([b"3"]) == []


def test_what_is_used_again_becomes_the_newest():
    allocator = BlockAllocator(3)
    old, new = publish(allocator, b"1")[0], publish(allocator, b"2")[0]
    allocator.share([old])
    allocator.free([old])
    assert allocator.allocate(2) == [new, old]


def test_of_two_blocks_with_one_content_the_first_is_found():
    allocator = BlockAllocator(3)
    first, second = allocator.allocate(2)
    allocator.publish(first, b"1")
    allocator.publish(second, b"1")
    assert allocator.match([b"1"]) == [first]
    allocator.free([first, second])
    assert allocator.allocate(1) == [second]
    assert allocator.match([b"1"]) == [first]


def test_withdrawn_content_is_not_found():
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(2)
    allocator.publish(blocks[0], b"1")
    allocator.withdraw(blocks)
    assert allocator.match([b"1"]) == []
    allocator.publish(blocks[1], b"1")
    assert allocator.match([b"1"]) == blocks[1:]


def test_only_held_blocks_are_published():
    with pytest.raises(ValueError, match="block 1 is not held"):
        BlockAllocator(3).publish(1, b"1")


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
