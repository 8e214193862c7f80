"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# No example is timed: a machine may be as slow as it is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
