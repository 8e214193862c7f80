"""What an extraction stored, what it costs, and how much of the change it holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Stored:
    """One changed parameter: its form, its bytes and, for the change, the error in its norm."""

    parameter: str
    form: str
    rank: int | None
    bytes: int
    full_bytes: int
    relative_error: float


@dataclass(frozen=True)
class LogitDifference:
    """Of base and change from the fine-tune itself, over all tokens of the sample prompts."""

    prompts: int
    largest: float
    # The share of tokens behind which both choose the same next one.
    same_choice: float
    # How far the base itself is from the fine-tune, to compare with.
    base_largest: float


@dataclass(frozen=True)
class Extraction:
    """Totals are of the files: the adapter's weights, and the fine-tune's checkpoint."""

    stored: tuple[Stored, ...]
    unchanged: int
    bytes: int
    full_bytes: int
    logits: LogitDifference | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it, and the bytes by form."""
        return asdict(self) | {"bytes_by_form": self.bytes_by_form()}

    def bytes_by_form(self) -> dict[str, int]:
        forms = sorted({stored.form for stored in self.stored})
        return {form: sum(s.bytes for s in self.stored if s.form == form) for form in forms}
