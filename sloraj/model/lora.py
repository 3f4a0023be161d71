"""The adapters' part of a linear layer, per device: beside the base's output, or added to it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm import add_lora
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_rows import chosen_config, lora_rows
from pallas_kernels.lora_rows_triton import Config
from pallas_kernels.lora_shrink import lora_shrink
from pallas_kernels.tiles import LoraTiles
from sloraj.model.step import StepInputs, StepSpec
from sloraj.parallel.collectives import device_index, gather_rank_rows, sum_partial


class Output(NamedTuple):
    """Of a linear layer, or what a block adds to the residual stream."""

    base: jax.Array  # [T, out]
    lora: jax.Array | None = None  # f32 [at most T, out], what adapters add to the first rows


class _Shrunk(NamedTuple):
    """Rows in their adapters' rank spaces, `[rows, modules, ranks]`; undefined outside tiles."""

    singles: jax.Array | None  # of the first rows; None: one kernel shrinks and expands them
    longer: jax.Array | None  # of all


@dataclasses.dataclass(frozen=True, slots=True)
class LoraDelta:
    """The adapters' low-rank additions to one layer's linear outputs (S-LoRA section 6.2).

    Those of single-token rows are kept apart and added where the output is read anyway: on the
    device their shrink and expand run beside the base's product, which they would else wait for,
    and beside what the longer rows of the step need, which is tiles of many rows and added in
    place. On one device one kernel does both for single rows, where that was measured to be faster.
    """

    pool: jax.Array
    layer: jax.Array
    inputs: StepInputs
    spec: StepSpec

    def column(
        self, base: jax.Array, x: jax.Array, modules: tuple[int, ...], out_sizes: tuple[int, ...]
    ) -> Output:
        """Column-parallel: each device shrinks with its rank rows, then one fused all-gather."""
        if not set(modules) & set(self.spec.lora_modules):
            return Output(base)
        tp = self.spec.tp
        v = self._shrink(x, modules, out_sizes, self.spec.max_rank // tp, rank_split=tp)
        v = self._across_devices(v, functools.partial(gather_rank_rows, tp=tp))
        lora = self._expand_singles(x, v, modules, out_sizes)
        return Output(self._expand_longer(base, v, modules, out_sizes, jnp.int32(0)), lora)

    def row(self, base: jax.Array, x: jax.Array, module: int) -> Output:
        """Row-parallel: the partial shrink is summed; of several devices each adds its columns to
        its partial, so that the base's all-reduce finishes both.
        """
        if module not in self.spec.lora_modules:
            return Output(base)
        tp, modules = self.spec.tp, (module,)
        out_sizes = (self.spec.config.hidden_size // tp,)
        offset = device_index(tp) * out_sizes[0]
        v = self._shrink(x, modules, out_sizes, self.spec.max_rank, rank_split=1)
        v = self._across_devices(v, functools.partial(sum_partial, tp=tp))
        lora = self._expand_singles(x, v, modules, out_sizes)
        base = self._expand_longer(base, v, modules, out_sizes, offset)
        if tp == 1:
            return Output(base, lora)
        mine = jax.lax.dynamic_slice(base, (0, offset), lora.shape)
        return Output(jax.lax.dynamic_update_slice(base, add_lora(mine, lora), (0, offset)))

    def _one_kernel(self, x: jax.Array, out_sizes: tuple[int, ...]) -> Config | None:
        """How one kernel shrinks and expands single rows, where it is to."""
        kernels = self.spec.kernels
        if self.spec.tp > 1 or (kernels.lora_shrink, kernels.lora_expand) != ("triton", "triton"):
            return None
        num_singles = self.inputs.single_tiles.row_order.shape[0]
        return chosen_config(num_singles, x.shape[1], out_sizes)

    def _shrink(
        self,
        x: jax.Array,
        modules: tuple[int, ...],
        out_sizes: tuple[int, ...],
        num_rows: int,
        *,
        rank_split: int,
    ) -> _Shrunk:
        def shrink(tiles: LoraTiles | None) -> jax.Array | None:
            if tiles is None:
                return None
            return lora_shrink(
                x, self.pool, self.inputs.slot_pages, self.layer, tiles, modules=modules,
                num_rows=num_rows, rank_split=rank_split,
                implementation=self.spec.kernels.lora_shrink,
            )  # fmt: skip

        is_one = self._one_kernel(x, out_sizes) is not None
        singles = None if is_one else shrink(self.inputs.single_tiles)
        return _Shrunk(singles, shrink(self.inputs.lora_tiles))

    def _across_devices(self, v: _Shrunk, combine: Callable[[jax.Array], jax.Array]) -> _Shrunk:
        """One collective for both kinds of rows."""
        if self.spec.tp == 1:
            return v
        assert v.singles is not None
        if v.longer is None:
            return v._replace(singles=combine(v.singles))
        num_singles = len(v.singles)
        is_single = self.inputs.lengths[:num_singles, None, None] > 0
        first = jnp.where(is_single, v.singles, v.longer[:num_singles])
        both = combine(jax.lax.dynamic_update_slice_in_dim(v.longer, first, 0, axis=0))
        return _Shrunk(both[:num_singles], both)

    def _expand_singles(
        self, x: jax.Array, v: _Shrunk, modules: tuple[int, ...], out_sizes: tuple[int, ...]
    ) -> jax.Array:
        tiles = self.inputs.single_tiles
        if v.singles is not None:
            return self._expand(None, v.singles, tiles, modules, out_sizes, jnp.int32(0))
        return lora_rows(
            x, self.pool, self.inputs.slot_pages, self.layer, tiles, modules=modules,
            out_sizes=out_sizes, max_rank=self.spec.max_rank, implementation="triton",
            config=self._one_kernel(x, out_sizes),
        )  # fmt: skip

    def _expand_longer(
        self,
        base: jax.Array,
        v: _Shrunk,
        modules: tuple[int, ...],
        out_sizes: tuple[int, ...],
        column_offset: jax.Array,
    ) -> jax.Array:
        tiles = self.inputs.lora_tiles
        if tiles is None or v.longer is None:
            return base
        return self._expand(base, v.longer, tiles, modules, out_sizes, column_offset)

    def _expand(
        self,
        base: jax.Array | None,
        v: jax.Array,
        tiles: LoraTiles,
        modules: tuple[int, ...],
        out_sizes: tuple[int, ...],
        column_offset: jax.Array,
    ) -> jax.Array:
        return lora_expand(
            base, v, self.pool, self.inputs.slot_pages, self.layer, tiles, column_offset,
            modules=modules, out_sizes=out_sizes, implementation=self.spec.kernels.lora_expand,
        )  # fmt: skip
