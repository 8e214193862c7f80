"""One holder a key, in order, and nothing left behind."""

from __future__ import annotations

import asyncio

from deltamux.store.catalog.keyed_lock import KeyedLock


async def test_one_key_is_serial_and_keys_are_independent():
    locks = KeyedLock()
    trace: list[tuple[str, int, str]] = []

    async def work(key: str, number: int) -> None:
        async with locks(key):
            trace.append((key, number, "in"))
            await asyncio.sleep(0)
            trace.append((key, number, "out"))

    await asyncio.gather(*(work(key, number) for number in range(5) for key in "ab"))
    for key in "ab":
        mine = [(number, what) for k, number, what in trace if k == key]
        assert mine == [(number, what) for number in range(5) for what in ("in", "out")]
    assert trace[:2] == [("a", 0, "in"), ("b", 0, "in")]
    assert len(locks) == 0


async def test_a_waiter_that_gives_up_leaves_nothing():
    locks = KeyedLock()
    async with locks("a"):
        waiter = asyncio.create_task(locks("a").__aenter__())
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert len(locks) == 1
    assert len(locks) == 0
