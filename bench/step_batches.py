"""The batches that `bench.step` times, as the simulator needs to know them too."""

from __future__ import annotations

RANKS: dict[str, tuple[int, ...]] = {"base": (0,), "s1": (8,), "s2": (64, 32, 16, 8)}
"""Of the rows, in turn; 0: the base model."""

MIXED_ROWS, MIXED_TOKENS = 64, 192  # decoding, beside a prompt: a common step under load


def row_ranks(kind: str, num_rows: int) -> list[int]:
    """Ranks of `num_rows` rows, each with an adapter of its own."""
    return [RANKS[kind][i % len(RANKS[kind])] for i in range(num_rows)]
