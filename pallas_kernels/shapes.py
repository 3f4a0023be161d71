"""Named real shapes and popularities: one list that tests, benchmarks and tuning all read."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np

RANKS = (8, 16, 32, 64)
Popularity = Literal["distinct", "uniform", "zipf", "identical", "base-only"]
POPULARITIES: tuple[str, ...] = get_args(Popularity)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one model that kernels see, in elements, on a single device."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    page_size: int = 16

    @property
    def page_elems(self) -> int:
        """Elements of a page of one layer."""
        return 2 * self.page_size * self.num_kv_heads * self.head_dim

    def module_sizes(self, module: int) -> tuple[int, int]:
        """(in, out) of a target module, by its index in q, k, v, o, gate, up, down."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, mlp = self.hidden_size, self.intermediate_size
        sizes = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden))
        return (*sizes, (hidden, mlp), (hidden, mlp), (mlp, hidden))[module]


MODELS: dict[str, ModelShape] = {
    "llama-7b": ModelShape(
        hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128, intermediate_size=11008
    ),
    "llama-3.1-8b": ModelShape(
        hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336
    ),
    "qwen2-0.5b": ModelShape(
        hidden_size=896, num_heads=14, num_kv_heads=2, head_dim=64, intermediate_size=4864
    ),
    "qwen2-7b": ModelShape(
        hidden_size=3584, num_heads=28, num_kv_heads=4, head_dim=128, intermediate_size=18944
    ),
    "demo": ModelShape(
        hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=344
    ),
}


def row_slots(popularity: str, num_rows: int, num_slots: int, seed: int) -> np.ndarray:
    """The adapter slot of each row, i32 `[num_rows]`, of `num_slots` slots numbered from 1.

    distinct: no slot twice before all are used; uniform: slots drawn evenly; zipf: the k-th slot
    with weight k ** -1.5; identical: one slot; base-only: slot 0 everywhere.
    """
    rng = np.random.default_rng(seed)
    slots = np.arange(1, num_slots + 1, dtype=np.int32)
    if popularity == "distinct":
        return np.resize(slots, num_rows)
    if popularity == "uniform":
        return rng.choice(slots, size=num_rows)
    if popularity == "zipf":
        weights = slots.astype(np.float64) ** -1.5
        return rng.choice(slots, size=num_rows, p=weights / weights.sum())
    if popularity == "identical":
        return np.full(num_rows, slots[-1], np.int32)
    if popularity == "base-only":
        return np.zeros(num_rows, np.int32)
    raise ValueError(f"popularity {popularity!r} is not one of {list(POPULARITIES)}")
