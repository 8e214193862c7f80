"""The folder of adapters: new, changed, unfinished and unfit subfolders."""

from __future__ import annotations

import shutil
from unittest.mock import Mock

import pytest

from deltamux.errors import FailedPrecondition
from deltamux.store.catalog.folder_watcher import FolderWatcher
from deltamux.store.digest import content_digest


@pytest.fixture
def watcher(store, files):
    files.root.mkdir()
    return FolderWatcher(files.root, store.catalog)


def names(store) -> list[str]:
    return [row.name for row in store.catalog.page(100)[0]]


async def test_new_subfolders_are_known_at_once_and_read_when_used(store, files, watcher):
    files.write("a", seed=1)
    await watcher.look()
    files.write("b", seed=2)
    await watcher.look()
    assert names(store) == ["a", "b"]
    assert store.catalog.get("a").tier == "remote"
    (await store.catalog.resolve("b")).release()


async def test_what_is_no_adapter_or_has_no_fit_name_is_passed_over(store, files, watcher):
    (files.root / "empty").mkdir()
    (files.root / "file").touch()
    files.write(".hidden", seed=1)
    files.write("with space", seed=1)
    half = files.write("half", seed=1)
    (half / "adapter_config.json").unlink()
    await watcher.look()
    assert names(store) == []
    files.write("half", seed=1)
    await watcher.look()
    assert names(store) == ["half"]


async def test_weights_that_are_missing_are_the_answer_of_the_first_request(store, files, watcher):
    weights = files.write("a", seed=1) / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    await watcher.look()
    with pytest.raises(FailedPrecondition) as refused:
        await store.catalog.resolve("a")
    assert refused.value.reason == "PICKLE_REFUSED"


async def test_changed_content_is_swapped_in_when_it_has_come_to_rest(store, files, watcher):
    old = content_digest(files.write("a", seed=1))
    await watcher.look()
    (await store.catalog.resolve("a")).release()
    new = content_digest(files.write("a", seed=2))
    await watcher.look()
    assert store.catalog.get("a").version == old
    await watcher.look()
    assert store.catalog.get("a").version == new
    assert old != new


async def test_a_broken_change_keeps_the_good_version_and_is_not_tried_for_ever(
    store, files, watcher, monkeypatch
):
    old = content_digest(files.write("a", seed=1))
    await watcher.look()
    (await store.catalog.resolve("a")).release()
    (files.root / "a" / "adapter_model.safetensors").write_bytes(b"<html>")
    ingest = Mock(wraps=store.disk.ingest)
    monkeypatch.setattr(store.disk, "ingest", ingest)
    for _ in range(5):
        await watcher.look()
    assert (store.catalog.get("a").version, ingest.call_count) == (old, 1)
    new = content_digest(files.write("a", seed=2))
    await watcher.look()
    await watcher.look()
    assert store.catalog.get("a").version == new


async def test_a_name_that_is_taken_keeps_its_source(store, files, watcher):
    other = files.write("elsewhere/a", seed=1)
    store.catalog.register("a", str(other))
    files.write("a", seed=2)
    for _ in range(3):
        await watcher.look()
    assert store.catalog.get("a").source == str(other)


async def test_a_subfolder_that_disappears_is_still_served(store, files, watcher):
    files.write("a", seed=1)
    await watcher.look()
    (await store.catalog.resolve("a")).release()
    shutil.rmtree(files.root)
    await watcher.look()
    (await store.catalog.resolve("a")).release()
