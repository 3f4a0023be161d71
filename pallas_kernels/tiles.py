"""How a step's token rows are cut into tiles: arrays made on the host, read by every kernel.

Both kinds have a fixed capacity G, so that a program's shapes never change; entries past
`num_tiles` are padding. Indices are int32.
"""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraTiles:
    """Token rows grouped by adapter slot. A tile has one slot and at most `block_rows` rows.

    Tile g covers rows `row_order[starts[g] : starts[g + 1]]`, all of slot `slots[g]`. Base-model
    rows and padding rows are in no tile, so they cost nothing. Tiles ascend in their starts; where
    `block_rows` is 1 the row of tile g is `row_order[g]`. Padding tiles have slot 0. Kernels take
    tiles in their order: those of high rank should come first.

    `segments` are those of the tiles' slots, gathered once a step: what a kernel must know before
    it can read anything is then one load away, in every layer.
    """

    row_order: jax.Array  # [T]; every row once, or of the first T alone; rows in tiles first
    starts: jax.Array  # [G + 1]
    slots: jax.Array  # [G]
    segments: jax.Array  # [L, G, 7, 4]; kind 0 everywhere in padding tiles
    num_tiles: jax.Array  # [1]
    block_rows: int = dataclasses.field(metadata={"static": True})

    @property
    def has_one_for_each_row(self) -> bool:
        """Whether each row may be a tile of its own."""
        return self.block_rows == 1 and self.slots.shape[0] >= self.row_order.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueryTiles:
    """Query tokens of a ragged step. A tile has at most `block_q` successive ones of one sequence.

    Kernels take tiles in their order: those with most to read should come first.

    Tile g covers tokens `[q_start[g], q_start[g] + q_len[g])`, whose absolute positions start at
    `position[g]`; keys and values are found through `page_table[row[g]]`, whose first
    `position[g] + q_len[g]` positions are written.
    """

    row: jax.Array  # [G]
    q_start: jax.Array  # [G]
    q_len: jax.Array  # [G]
    position: jax.Array  # [G]
    num_tiles: jax.Array  # [1]
    block_q: int = dataclasses.field(metadata={"static": True})
