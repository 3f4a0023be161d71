"""The LoRA ops whose configurations are searched: what each tries, computes and is looked up by.

A search is for one op on modules that share an input, at one number of rows.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bench.kernels_lora import BESIDE_DECODE, GROUPS, MAX_RANK, Case
from pallas_kernels import lora_expand_triton, lora_rows_triton, lora_shrink_triton
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_rows import lora_rows, table_key
from pallas_kernels.lora_shrink import lora_shrink
from pallas_kernels.tiles import LoraTiles

TWO_KERNELS = None  # in place of a configuration of one kernel
Config = lora_shrink_triton.Config | lora_expand_triton.Config | lora_rows_triton.Config | None
Place = tuple[jax.Array, jax.Array, jax.Array, LoraTiles]  # pool, slot_pages, layer, tiles
Layer = Callable[[jax.Array, jax.Array, jax.Array, Place], jax.Array]  # y, x, v, place -> y


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(abc.ABC):
    """`op` is its name in the table. The rank of the case is replaced by others in turn."""

    op: ClassVar[str]
    modules: tuple[int, ...]
    case: Case

    @property
    def is_beside(self) -> bool:
        """Whether most rows of the step decode: a few tiles, which no other work hides."""
        return self.case.popularity == BESIDE_DECODE

    @property
    def size_in(self) -> int:
        return self.case.shape.module_sizes(self.modules[0])[0]

    @property
    def out_sizes(self) -> tuple[int, ...]:
        return tuple(self.case.shape.module_sizes(module)[1] for module in self.modules)

    @property
    def y_width(self) -> int:
        """Columns of what the layers add to, one after the other."""
        return sum(self.out_sizes)

    @abc.abstractmethod
    def key(self, tiles: LoraTiles) -> str:
        """The key of its shape in the table."""

    @abc.abstractmethod
    def candidates(self) -> Iterator[Config]:
        """What may be good: enough loads under way, and few enough registers."""

    @abc.abstractmethod
    def layer(self, config: Any) -> Layer:
        """One layer's share of the program that is timed."""

    def rows(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(y, x, v) to time it on."""
        num_rows = self.case.num_rows
        return (
            jnp.zeros((num_rows, self.y_width), jnp.bfloat16),
            jnp.full((num_rows, self.size_in), 1e-3, jnp.bfloat16),
            jnp.full((num_rows, len(self.modules), MAX_RANK), 1e-3, jnp.float32),
        )

    def shrink(self, x: jax.Array, place: Place, config: Any = None) -> jax.Array:
        return lora_shrink(
            x, *place, modules=self.modules, num_rows=MAX_RANK, rank_split=1,
            implementation="triton", config=config,
        )  # fmt: skip

    def expand(
        self, y: jax.Array | None, v: jax.Array, place: Place, config: Any = None
    ) -> jax.Array:
        return lora_expand(
            y, v, *place, jnp.int32(0), modules=self.modules, out_sizes=self.out_sizes,
            implementation="triton", config=config,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkSearch(Search):
    """Timed with the expand that reads it: a program that returned what every layer's shrink makes
    would spend its time on allocating results.
    """

    op = "lora_shrink"

    def key(self, tiles: LoraTiles) -> str:
        return lora_shrink_triton.find_config(
            tiles, block_rows=tiles.block_rows, width=self.size_in,
            num_modules=len(self.modules), num_rows=MAX_RANK,
        )[0]  # fmt: skip

    def candidates(self) -> Iterator[Config]:
        config = lora_shrink_triton.Config
        if self.case.is_decode:
            for shares, ranks, warps in itertools.product((2, 4, 8, 16, 32, 64), (1, 2, 4), (4, 8)):
                if ranks * 4 >= warps:
                    yield config(num_shares=shares, row_ranks=ranks, num_warps=warps)
        elif self.is_beside:
            for (stages, chunks), warps, parts in itertools.product(
                ((2, 1), (3, 1), (5, 1), (6, 1), (2, 2), (3, 2), (2, 4)), (4, 8), (1, 2, 4, 8)
            ):
                yield config(
                    num_shares=4, num_stages=stages, num_warps=warps, row_ranks=2, tile_ranks=16,
                    tile_chunks=chunks, num_parts=parts,
                )  # fmt: skip
        else:
            for shares, ranks, chunks, stages in itertools.product(
                (1, 2, 4), (16, 32, 64), (1, 2), (3, 4)
            ):
                if shares * ranks <= MAX_RANK:
                    yield config(
                        num_shares=shares, tile_ranks=ranks, tile_chunks=chunks, num_warps=4,
                        num_stages=stages,
                    )  # fmt: skip

    def layer(self, config: Any) -> Layer:
        return lambda y, x, v, place: self.expand(y, self.shrink(x, place, config), place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpandSearch(Search):
    op = "lora_expand"

    def key(self, tiles: LoraTiles) -> str:
        return lora_expand_triton.find_config(
            tiles, block_rows=tiles.block_rows, width=self.y_width, num_ranks=MAX_RANK
        )[0]

    def candidates(self) -> Iterator[Config]:
        config = lora_expand_triton.Config
        if self.case.is_decode:
            for chunks, ranks, warps in itertools.product(
                (1, 2, 4, 8, 16), (4, 8, 16, 32), (1, 2, 4)
            ):
                if 4 <= chunks * ranks // (2 * warps) <= 16:
                    yield config(block_chunks=chunks, row_ranks=ranks, num_warps=warps)
        elif self.is_beside:
            for chunks, columns, warps in itertools.product((1, 2, 4), (32, 64, 128), (4, 8)):
                yield config(
                    block_chunks=chunks, tile_columns=columns, num_warps=warps, row_ranks=16
                )
        else:
            for chunks, ranks, columns in itertools.product((1, 2, 4), (16, 32, 64), (32, 64, 128)):
                yield config(
                    block_chunks=chunks, tile_ranks=ranks, tile_columns=columns, num_warps=4
                )

    def layer(self, config: Any) -> Layer:
        return lambda y, x, v, place: self.expand(y, v, place, config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsSearch(Search):
    """One kernel for single rows, or two: a layer reads what the one before made of its rows."""

    op = "lora_rows"

    @property
    def y_width(self) -> int:
        return self.size_in

    def key(self, tiles: LoraTiles) -> str:
        return table_key(self.case.num_rows, self.size_in, self.out_sizes)

    def candidates(self) -> Iterator[Config]:
        yield TWO_KERNELS
        for chunks, ranks, warps in itertools.product((4, 8, 16, 32), (2, 4, 8), (4, 8)):
            if ranks == warps or 2 * ranks == warps:
                yield lora_rows_triton.Config(block_chunks=chunks, row_ranks=ranks, num_warps=warps)

    def delta(self, x: jax.Array, place: Place, config: Any) -> jax.Array:
        """What adapters add to the rows."""
        if config is TWO_KERNELS:
            return self.expand(None, self.shrink(x, place), place)
        return lora_rows(
            x, *place, modules=self.modules, out_sizes=self.out_sizes, max_rank=MAX_RANK,
            implementation="triton", config=config,
        )  # fmt: skip

    def layer(self, config: Any) -> Layer:
        def add(y: jax.Array, x: jax.Array, v: jax.Array, place: Place) -> jax.Array:
            delta = self.delta(y, place, config)
            width = min(y.shape[1], delta.shape[1])
            return y.at[:, :width].add(delta[:, :width].astype(y.dtype))

        return add


OPS: dict[str, type[Search]] = {
    search.op: search for search in (ShrinkSearch, ExpandSearch, RowsSearch)
}


def searches(
    models: list[str], num_rows: list[int], beside: list[int], groups: list[str]
) -> Iterator[Search]:
    """Of batches that decode, and of prompts of `beside` tokens with 64 more rows decoding."""
    batches = [("distinct", rows) for rows in num_rows]
    batches += [(BESIDE_DECODE, tokens) for tokens in beside]
    for model, (popularity, rows), group in itertools.product(models, batches, groups):
        is_decode = popularity == "distinct" and rows <= 256
        case = Case(
            model=model, group=group, num_rows=rows, rank="8", popularity=popularity,
            num_slots=min(rows, 64) if popularity == "distinct" else 1,
            num_layers=64 if is_decode else 8,
        )  # fmt: skip
        for modules, kind in itertools.product(GROUPS[group], OPS.values()):
            if is_decode or kind is not RowsSearch:
                yield kind(modules=modules, case=case)
