"""The runner's device state by shape: made once from this description, and compiled against it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints.model_config import TARGET_MODULES
from sloraj.config import PoolLayout, div_ceil
from sloraj.parallel.mesh import AXIS, replicated
from sloraj.runner.rows import FLOATS, INTS, NUM_BIAS, RowState
from sloraj.sampler import SamplingRows, TokenCounts

POOL_SPEC = PartitionSpec(None, AXIS)
STAGING_SPEC = PartitionSpec(None, None, AXIS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Sizes of the device state."""

    layout: PoolLayout
    num_pages: int
    max_num_seqs: int
    max_model_len: int
    max_adapter_slots: int  # slot 0 not counted
    max_adapter_pages: int
    checked: bool = False

    @property
    def null_row(self) -> int:
        """The row that padding reads and writes: one past the last."""
        return self.max_num_seqs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTable:
    """Where each slot's weights lie, i32. Slot 0 is the base model: nothing."""

    slot_pages: jax.Array  # [slots, max_adapter_pages]
    num_pages: jax.Array  # [slots]
    segments: jax.Array  # [layers, slots, 7, 4]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardState:
    """What a forward program replaces: donated and returned."""

    pools: list[jax.Array]  # per layer [pages, tp * page_elems]
    page_table: jax.Array  # [rows, pages_per_row]
    owners: jax.Array | None  # i32 [pages], in checked mode only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleState:
    """What a sample program replaces: donated and returned."""

    last_token: jax.Array  # i32 [rows]
    counts: TokenCounts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepLogits:
    """What a forward program hands to a sample program."""

    logits: jax.Array  # f32 [B, V]
    rows: jax.Array  # i32 [B]; padding is the null row
    positions: jax.Array  # i32 [B] of the tokens to draw
    violations: jax.Array  # i32 [], checked mode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    forward: ForwardState
    sample: SampleState
    rows: RowState
    table: AdapterTable


def abstract_state(config: RunnerConfig, mesh: Mesh, vocab_size: int) -> DeviceState:
    """Shapes, dtypes and shardings of the whole state."""
    layout = config.layout
    num_rows, num_slots = config.max_num_seqs + 1, config.max_adapter_slots + 1

    def whole(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    pool: Any = jax.ShapeDtypeStruct(
        (config.num_pages, layout.tp * layout.page_elems),
        jnp.dtype(layout.dtype),
        sharding=NamedSharding(mesh, POOL_SPEC),
    )
    return DeviceState(
        forward=ForwardState(
            pools=[pool] * layout.num_layers,
            page_table=whole(num_rows, div_ceil(config.max_model_len, layout.page_size)),
            owners=whole(config.num_pages) if config.checked else None,
        ),
        sample=SampleState(
            last_token=whole(num_rows),
            counts=TokenCounts(
                in_prompt=whole(num_rows, vocab_size, dtype=jnp.bool_),
                output=whole(num_rows, vocab_size),
            ),
        ),
        rows=_abstract_rows(num_rows, whole),
        table=AdapterTable(
            slot_pages=whole(num_slots, config.max_adapter_pages),
            num_pages=whole(num_slots),
            segments=whole(layout.num_layers, num_slots, len(TARGET_MODULES), 4),
        ),
    )


def _abstract_rows(num_rows: int, whole: Any) -> RowState:
    sampling = {name: whole(num_rows, dtype=jnp.float32) for name in FLOATS}
    sampling |= {name: whole(num_rows) for name in INTS}
    return RowState(
        slot=whole(num_rows),
        tag=whole(num_rows),
        adapter_tag=whole(num_rows),
        sampling=SamplingRows(
            **sampling,
            bias_ids=whole(num_rows, NUM_BIAS),
            bias_values=whole(num_rows, NUM_BIAS, dtype=jnp.float32),
            bias_until=whole(num_rows, NUM_BIAS),
        ),
    )


def abstract_logits(mesh: Mesh, num_logits: int, vocab_size: int) -> StepLogits:
    def whole(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    return StepLogits(
        logits=whole((num_logits, vocab_size), jnp.float32),
        rows=whole((num_logits,), jnp.int32),
        positions=whole((num_logits,), jnp.int32),
        violations=whole((), jnp.int32),
    )


def zeros(tree: Any) -> Any:
    """Arrays of zeros for an abstract tree, made on their devices."""

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        made: jax.Array = jax.jit(
            lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding
        )()
        return made

    return jax.tree.map(make, tree)
