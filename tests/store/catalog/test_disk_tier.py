"""Copies on disk: complete or absent, whatever the source and the last crash were like."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog

from deltamux.errors import Aborted, DeltamuxError, InvalidArgument, ResourceExhausted
from deltamux.store.catalog import disk_tier
from deltamux.store.catalog.disk_tier import DiskTier
from deltamux.store.digest import content_digest

WEIGHTS = "adapter_model.safetensors"


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_copy_is_complete_and_named_by_its_content(files, make_disk, tmp_path):
    disk = make_disk()
    source = files.write("a", seed=1)
    digest = disk.ingest(source)
    assert digest == content_digest(source) == content_digest(disk.path(digest))
    assert digest in disk
    assert disk.used_bytes == sum(path.stat().st_size for path in source.iterdir())
    assert leftovers(tmp_path) == []


def test_files_that_a_user_may_expect_to_count_are_named_in_a_warning(files, make_disk):
    source = files.write("a", seed=1)
    for name in ("chat_template.jinja", "generation_config.json", "README.md"):
        (source / name).write_text("{}")
    with structlog.testing.capture_logs() as events:
        digest = make_disk().ingest(source)
    warning = {"version": digest, "files": ["chat_template.jinja", "generation_config.json"]}
    assert [event for event in events if event["log_level"] == "warning"] == [
        {**warning, "log_level": "warning", "event": "files beside an adapter are not used"}
    ]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_what_lies_beside_and_counts_is_copied_and_part_of_the_content(files, make_disk, name):
    disk = make_disk()
    bare = disk.ingest(files.write("a", seed=1))
    more = files.write("b", seed=1)
    (more / name).write_text("{}")
    digest = disk.ingest(more)
    assert digest != bare
    assert (disk.path(digest) / name).read_text() == "{}"
    assert not (disk.path(bare) / name).exists()


def test_the_same_content_is_kept_once(files, make_disk):
    disk = make_disk()
    first = disk.ingest(files.write("a", seed=1))
    used = disk.used_bytes
    assert disk.ingest(files.write("b", seed=1)) == first
    assert disk.used_bytes == used


def test_a_copy_has_one_name_for_weights(files, make_disk):
    disk = make_disk()
    source = files.write("a", seed=1)
    (source / WEIGHTS).rename(source / "adapter.safetensors")
    copy = disk.path(disk.ingest(source))
    assert (copy / WEIGHTS).read_bytes() == (source / "adapter.safetensors").read_bytes()
    assert len(list(copy.iterdir())) == 2


def test_copies_survive_a_restart_and_unfinished_ones_do_not(files, make_disk, tmp_path):
    disk = make_disk()
    digest = disk.ingest(files.write("a", seed=1))
    # A process that has ended left these behind, and an unrelated file is none of our business.
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    for name in (f".tmp-{int(ended.stdout)}-abc", ".tmp-junk", "f" * 64):
        (tmp_path / "cache" / name).mkdir()
    (tmp_path / "cache" / "notes.txt").touch()
    # Another process still works in this one.
    (tmp_path / "cache" / f".tmp-{os.getppid()}-abc").mkdir()

    again = make_disk()

    assert (digest in again, "f" * 64 in again) == (True, False)
    assert again.used_bytes == disk.used_bytes
    assert leftovers(tmp_path) == [f".tmp-{os.getppid()}-abc"]
    assert (tmp_path / "cache" / "notes.txt").exists()


def test_a_crash_at_any_write_leaves_no_partial_copy(files, make_disk, tmp_path):
    """Kills a real process at each system call of an ingest that matters."""
    source = files.write("a", seed=1)
    script = """
import os, sys
from pathlib import Path
from deltamux.store.catalog.disk_tier import DiskTier
calls = 0
def killing(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os._exit(9)
        return function(*args, **kwargs)
    return call
store = DiskTier(Path(sys.argv[1]), 1 << 20, 1 << 20, lambda folder: None)
os.fsync, os.rename = killing(os.fsync), killing(os.rename)
store.ingest(Path(sys.argv[2]))
"""
    outcomes = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for step in range(1, 6):
        cache = tmp_path / "cache"
        command = [sys.executable, "-c", script, str(cache), str(source), str(step)]
        outcomes.append(subprocess.run(command, timeout=60, env=environment).returncode)
        disk = make_disk()
        for folder in cache.iterdir():
            assert content_digest(folder) == folder.name
        assert leftovers(tmp_path) == []
        for digest in os.listdir(cache):
            disk.purge(digest)
    # Two files, their folder, the rename: four places to die at.
    assert outcomes == [9, 9, 9, 9, 0]


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "missing"])
@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_only_regular_files_are_read_and_a_fifo_never_blocks(
    files, make_disk, tmp_path, kind, name
):
    source = files.write("a", seed=1)
    path = source / name
    path.rename(tmp_path / "elsewhere")
    match kind:
        case "symlink":
            path.symlink_to(tmp_path / "elsewhere")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    with pytest.raises(InvalidArgument):
        make_disk().ingest(source)
    assert leftovers(tmp_path) == []


def test_a_source_that_is_no_folder_is_refused(make_disk, tmp_path):
    with pytest.raises(InvalidArgument) as error:
        make_disk().ingest(tmp_path / "nowhere")
    assert error.value.reason == "SOURCE_NOT_FOUND"


def test_a_malformed_file_leaves_nothing(files, make_disk, tmp_path):
    source = files.write("a", seed=1)
    (source / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    disk = make_disk()
    with pytest.raises(InvalidArgument):
        disk.ingest(source)
    assert (disk.used_bytes, os.listdir(tmp_path / "cache")) == (0, [])


def test_a_sparse_terabyte_is_refused_unread(files, make_disk):
    source = files.write("a", seed=1)
    os.truncate(source / WEIGHTS, 1 << 40)
    with pytest.raises(ResourceExhausted) as error:
        make_disk().ingest(source)
    assert (error.value.reason, error.value.retry_after) == ("ADAPTER_TOO_LARGE", None)


@pytest.mark.parametrize("change", ["rewrite", "grow", "shrink", "replace"])
def test_a_source_that_changes_while_it_is_read_is_refused(files, make_disk, monkeypatch, change):
    source = files.write("a", seed=1)
    disk = make_disk()
    weights = source / WEIGHTS
    content = weights.read_bytes()
    chunks = disk_tier.chunks
    changes = {
        "rewrite": lambda: weights.write_bytes(content),
        "grow": lambda: weights.write_bytes(content + b"x"),
        "shrink": lambda: weights.write_bytes(content[:-1]),
        "replace": lambda: files.write("b", seed=2).joinpath(WEIGHTS).rename(weights),
    }

    def changing(*arguments):
        changes[change]()
        return chunks(*arguments)

    monkeypatch.setattr(disk_tier, "chunks", changing)
    with pytest.raises(Aborted) as error:
        disk.ingest(source)
    assert error.value.reason == "SOURCE_CHANGED"
    monkeypatch.undo()
    if change != "replace":
        weights.write_bytes(content)
    assert disk.ingest(source) in disk


def test_a_source_that_grows_once_it_is_measured_is_refused(files, make_disk, monkeypatch):
    source = files.write("a", seed=1)
    disk = make_disk()
    copy = disk_tier._copy

    def grown(*arguments):
        files.write("a", seed=1, rank=3)
        return copy(*arguments)

    monkeypatch.setattr(disk_tier, "_copy", grown)
    with pytest.raises(Aborted) as error:
        disk.ingest(source)
    assert (error.value.reason, disk.used_bytes) == ("SOURCE_CHANGED", 0)


def test_the_least_recently_used_copy_that_nobody_holds_goes_first(files, make_disk):
    sources = [files.write(str(seed), seed) for seed in range(4)]
    size = sum(path.stat().st_size for path in sources[0].iterdir())
    disk = make_disk(capacity=3 * size)
    first, second, third = (disk.ingest(source) for source in sources[:3])
    for digest in (second, third, first):
        disk.unhold(digest)
    assert disk.hold(second)
    disk.unhold(second)
    assert disk.hold(first)

    fourth = disk.ingest(sources[3])

    assert [d in disk for d in (first, second, third, fourth)] == [True, True, False, True]
    assert not disk.path(third).exists()
    assert not disk.hold(third)
    assert disk.hold(second)
    with pytest.raises(ResourceExhausted) as error:
        disk.ingest(sources[2])
    assert (error.value.reason, error.value.retry_after is None) == ("DISK_FULL", False)
    assert disk.used_bytes == 3 * size


@pytest.mark.parametrize(
    "number, code", [(errno.ENOSPC, "RESOURCE_EXHAUSTED"), (errno.EIO, "UNAVAILABLE")]
)
def test_a_failing_disk_is_an_error_that_heals(
    files, make_disk, monkeypatch, tmp_path, number, code
):
    disk, source = make_disk(), files.write("a", seed=1)

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DeltamuxError) as error:
        disk.ingest(source)
    assert (error.value.code, error.value.retry_after is None) == (code, False)
    assert (disk.used_bytes, leftovers(tmp_path)) == (0, [])
    monkeypatch.undo()
    assert disk.ingest(source) in disk


def test_purge_deletes_the_copy(files, make_disk, tmp_path):
    disk = make_disk()
    digest = disk.ingest(files.write("a", seed=1))
    disk.purge(digest)
    assert (digest in disk, disk.used_bytes, os.listdir(tmp_path / "cache")) == (False, 0, [])
    disk.unhold(digest)


def test_a_cache_that_somebody_deleted_is_made_anew(files, make_disk, tmp_path):
    disk, folders = make_disk(), [files.write(str(seed), seed) for seed in range(2)]
    shutil.rmtree(tmp_path / "cache")
    first = disk.ingest(folders[0])
    shutil.rmtree(tmp_path / "cache")
    disk.unhold(first)
    disk.purge(first)
    assert os.listdir(disk.path(disk.ingest(folders[1])))


def test_servers_that_start_together_sweep_one_folder(make_disk, tmp_path, monkeypatch):
    stale = tmp_path / "cache" / ".tmp-999999999-x"
    stale.mkdir(parents=True)
    scan = os.scandir

    def slower(folder):
        seen = list(scan(folder))
        stale.rmdir()
        return seen

    monkeypatch.setattr(os, "scandir", slower)
    assert make_disk().used_bytes == 0


def test_servers_may_share_the_folder(files, tmp_path):
    """Two stores ingest and evict in one folder; whatever is there is whole."""
    sources = [files.write(str(seed), seed) for seed in range(6)]
    size = sum(path.stat().st_size for path in sources[0].iterdir())
    stores = [DiskTier(tmp_path / "cache", 3 * size, size, lambda folder: None) for _ in range(2)]
    barrier = threading.Barrier(2)

    def churn(store: DiskTier) -> None:
        barrier.wait()
        for source in sources * 3:
            store.unhold(store.ingest(source))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(churn, stores))
    for folder in (tmp_path / "cache").iterdir():
        assert content_digest(folder) == folder.name
