"""The one kind of link that is followed: from a snapshot to its blob, in the cache of the Hub.

In the folder `models--ORG--NAME` of a repository, `snapshots/REVISION/FILE` is a link to
`../../blobs/DIGEST`, and a FILE may lie in folders of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

_REPOSITORY, _SNAPSHOTS, _BLOBS = "models--", "snapshots", "blobs"


def stored_path(path: Path) -> Path:
    """The blob that a snapshot's file is a link to, which must lie in the same repository's folder.

    Any other path comes back as it is, a link too. What is at the blob's path has not been seen.
    """
    try:
        link = path.parent / os.readlink(path)
    except OSError:
        return path
    blobs = _blobs(path.parent)
    if blobs is None or Path(os.path.realpath(link.parent)) != blobs:
        return path
    return blobs / link.name


def _blobs(folder: Path) -> Path | None:
    """Where the blobs of a snapshot lie, by the name of the folder without any link in it."""
    real = Path(os.path.realpath(folder))
    for snapshots in real.parents:
        if snapshots.name == _SNAPSHOTS and snapshots.parent.name.startswith(_REPOSITORY):
            return snapshots.parent / _BLOBS
    return None
