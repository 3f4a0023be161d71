"""The adapters' part of a linear layer, per device: beside the base's output, or added to it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_shrink import lora_shrink
from sloraj.model.step import StepInputs, StepSpec
from sloraj.parallel.collectives import device_index, gather_rank_rows, sum_partial


class Output(NamedTuple):
    """Of a linear layer, or what a block adds to the residual stream."""

    base: jax.Array  # [T, out]
    lora: jax.Array | None = None  # f32, what adapters add, where that is kept apart


@dataclasses.dataclass(frozen=True, slots=True)
class LoraDelta:
    """The adapters' low-rank additions to one layer's linear outputs (S-LoRA section 6.2).

    In decode steps they are kept apart and added where the output is read anyway: on the device
    shrink and expand then run beside the base's product, which they would else wait for.
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
        v = self._shrink(x, modules, self.spec.max_rank // tp, rank_split=tp)
        v = gather_rank_rows(v, tp)
        if self._is_single_rows:
            return Output(base, self._expand(None, v, modules, out_sizes, jnp.int32(0)))
        return Output(self._expand(base, v, modules, out_sizes, jnp.int32(0)))

    def row(self, base: jax.Array, x: jax.Array, module: int) -> Output:
        """Row-parallel: the partial shrink is summed; of several devices each adds its columns to
        its partial, so that the base's all-reduce finishes both.
        """
        if module not in self.spec.lora_modules:
            return Output(base)
        tp = self.spec.tp
        v = sum_partial(self._shrink(x, (module,), self.spec.max_rank, rank_split=1), tp)
        columns = self.spec.config.hidden_size // tp
        if self._is_single_rows and tp == 1:
            return Output(base, self._expand(None, v, (module,), (columns,), jnp.int32(0)))
        offset = device_index(tp) * columns
        return Output(self._expand(base, v, (module,), (columns,), offset))

    @property
    def _is_single_rows(self) -> bool:
        return self.inputs.lora_tiles.block_rows == 1

    def _shrink(
        self, x: jax.Array, modules: tuple[int, ...], num_rows: int, *, rank_split: int
    ) -> jax.Array:
        return lora_shrink(
            x, self.pool, self.inputs.slot_pages, self.layer,
            self.inputs.lora_tiles, modules=modules, num_rows=num_rows, rank_split=rank_split,
            implementation=self.spec.kernels.lora_shrink,
        )  # fmt: skip

    def _expand(
        self,
        base: jax.Array | None,
        v: jax.Array,
        modules: tuple[int, ...],
        out_sizes: tuple[int, ...],
        column_offset: jax.Array,
    ) -> jax.Array:
        return lora_expand(
            base, v, self.pool, self.inputs.slot_pages, self.layer,
            self.inputs.lora_tiles, column_offset, modules=modules, out_sizes=out_sizes,
            implementation=self.spec.kernels.lora_expand,
        )  # fmt: skip
