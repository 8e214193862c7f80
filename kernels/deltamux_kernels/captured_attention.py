"""The sequences of a captured graph: the same memory in every replay, refilled in between."""

from __future__ import annotations

from torch import Tensor

from deltamux_kernels.attention_batch import AttentionBatch, tile_list
from deltamux_kernels.captured_table import CapturedTable, most_tiles


class CapturedAttention(AttentionBatch):
    """A batch to capture a graph with, whose replays divide up to T rows among up to B sequences.

    The sequence after the last has no query and no key. Tiles that a replay does not have name it,
    and their programs return at once. Lengths are not known on the host: what would read them is
    wrong in a replay, and fails here.
    """

    def __init__(
        self,
        rows: int,
        decodes: bool,
        query_starts: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
    ) -> None:
        """`query_starts` int32 [B + 2], `seq_lens` int32 [B + 1] and `block_tables`
        int32 [B + 1, M] are what the graph reads, and others write between replays.

        Where it `decodes`, each of T = B sequences has at most one row.
        """
        self._rows = rows
        self._nobody = len(seq_lens) - 1
        self._query_lens: tuple[int, ...] = ()
        # By the most queries of a tile.
        self._tiles: dict[int, CapturedTable] = {}
        vars(self).update(
            plans={},
            decodes=decodes,
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_tables=block_tables,
        )

    def fill(self, query_lens: tuple[int, ...]) -> None:
        """Puts the tiles of a step's sequences in place for the next replay; waits for nothing."""
        self._query_lens = query_lens
        for rows, table in self._tiles.items():
            self._fill(table, rows)

    def query_tiles(self, rows: int) -> Tensor:
        """As many as there can be, of what was filled in last."""
        if rows not in self._tiles:
            capacity = most_tiles(self._rows, self._nobody, rows)
            table = CapturedTable(capacity, (self._nobody, 0), self.seq_lens.device)
            self._tiles[rows] = table
            self._fill(table, rows)
        return self._tiles[rows].tensor

    def _fill(self, table: CapturedTable, rows: int) -> None:
        filled = table.fill(tile_list(self._query_lens, rows))
        assert filled
