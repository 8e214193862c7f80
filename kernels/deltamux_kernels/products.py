"""The products x A^T of a step on a CPU, on their way from shrink to expand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from deltamux_kernels.native.low_rank import Task, Tasks
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the C form keeps the products: those of a span row after row, spans end to end."""

    segments: Segments
    version: object  # of A
    tasks: tuple[Task, ...]  # by span
    size: int
    shrink: Tasks
    # By B: its version, and what expand has to do.
    _expands: dict[PackedMatrices, tuple[object, Tasks]] = field(default_factory=dict)

    @classmethod
    def of(cls, a: PackedMatrices, segments: Segments) -> Layout:
        """The same as for the step before, where nothing changed."""
        # Read first: another slot may be written meanwhile.
        version = a.version
        kept = segments.layouts.get(a)
        if not isinstance(kept, cls) or kept.version is not version:
            kept = segments.layouts[a] = cls._build(a, version, segments)
        return kept

    @classmethod
    def _build(cls, a: PackedMatrices, version: object, segments: Segments) -> Layout:
        tasks, size = [], 0
        for slot, start, end in segments.spans:
            rank = a.rows_of(slot)
            tasks.append(Task(start, end - start, a.offset_of(slot), rank, size, rank))
            size += (end - start) * rank
        return cls(segments, version, tuple(tasks), size, Tasks(tasks))

    def expand(self, b: PackedMatrices, first_columns: list[int]) -> Tasks:
        """The products of each span from its slot's first column on, times its B."""
        version = b.version
        kept = self._expands.get(b)
        if kept is None or kept[0] is not version:
            tasks = [
                task._replace(
                    matrix=b.offset_of(slot),
                    rank=b.rows_of(slot),
                    first=task.first + first_columns[slot],
                )
                for task, (slot, _, _) in zip(self.tasks, self.segments.spans, strict=True)
            ]
            kept = self._expands[b] = (version, Tasks(tasks))
        return kept[1]


@dataclass(frozen=True, eq=False)
class NativeProducts:
    """All in one tensor, as the C form leaves them."""

    values: torch.Tensor
    layout: Layout

    def pieces(self) -> list[torch.Tensor | None]:
        """The products of each span, as views [rows, rank]; None where the slot has no matrix."""
        return [
            self.values[task.first : task.first + task.rows * task.rank].view(task.rows, task.rank)
            if task.rank
            else None
            for task in self.layout.tasks
        ]
