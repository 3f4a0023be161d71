"""Linear layer of few rows in Pallas-Triton: weights stream through the tensor cores once.

One program owns a block of output features, a block of rows and one share of the input features.
Weights are the left operand ("swapped"): a step's few rows fill the narrow side of the tensor
cores' tile, the weights its wide one, and one-byte weights are converted in registers on the way.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.triton_blocks import MIN_DOT, Ref, dot_f32, next_power_of_2, triton_call


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one program of the Triton kernel works."""

    block_out: int  # output features, rows of the weight
    block_in: int  # input features in a step of the loop
    split_in: int  # programs that share the input features of one output block
    block_rows: int  # rows of x at most
    num_warps: int
    num_stages: int
    swap: bool = True  # weights as the left operand

    @classmethod
    def heuristic(cls, *, num_rows: int, out_size: int, in_size: int) -> Config:
        """A reasonable choice where nothing was measured: two programs a processor of 132."""
        block_out, block_in = (128, 64) if num_rows > 16 else (64, 128)
        blocks = pl.cdiv(out_size, block_out) * pl.cdiv(num_rows, 128)
        split = max(1, min(8, 264 // blocks, in_size // (4 * block_in)))
        return cls(
            block_out=block_out, block_in=block_in, split_in=split, block_rows=128,
            num_warps=4 if block_out == 64 else 8, num_stages=4,
        )  # fmt: skip


def _kernel(x_ref: Ref, weight_ref: Ref, *refs: Ref, config: Config, block_rows: int) -> None:
    *scale_refs, out_ref = refs
    num_rows, in_size = x_ref.shape
    out_size = weight_ref.shape[0]
    out_block, row_block, share = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    features = out_block * config.block_out + jnp.arange(config.block_out, dtype=jnp.int32)
    rows = row_block * block_rows + jnp.arange(block_rows, dtype=jnp.int32)
    lane = jnp.arange(config.block_in, dtype=jnp.int32)
    is_feature = features < out_size
    is_row = rows < num_rows
    num_steps = pl.cdiv(in_size, config.block_in)

    def load(
        ref: Ref, index: jax.Array, is_real: jax.Array, column: jax.Array, whole: bool
    ) -> jax.Array:
        mask = None
        if not whole:
            mask = is_real[:, None]
        if in_size % config.block_in:
            inside = (column < in_size)[None, :]
            mask = inside if mask is None else mask & inside
        if mask is not None:
            mask = jnp.broadcast_to(mask, (index.shape[0], column.shape[0]))
        other = None if mask is None else jnp.zeros((), ref.dtype)
        return pltriton.load(ref.at[index[:, None], column[None, :]], mask=mask, other=other)

    def add_step(step: jax.Array, product: jax.Array) -> jax.Array:
        column = step * config.block_in + lane
        weight = load(weight_ref, features, is_feature, column, out_size % config.block_out == 0)
        x = load(x_ref, rows, is_row, column, num_rows % block_rows == 0)
        weight = weight.astype(x.dtype)
        if config.swap:
            return product + dot_f32(weight, x, trans_b=True)
        return product + dot_f32(x, weight, trans_b=True)

    shape = (config.block_out, block_rows) if config.swap else (block_rows, config.block_out)
    first = jax.lax.div(share * num_steps, jnp.int32(config.split_in))
    stop = jax.lax.div((share + 1) * num_steps, jnp.int32(config.split_in))
    product = jax.lax.fori_loop(first, stop, add_step, jnp.zeros(shape, jnp.float32))

    def lay(values: jax.Array, is_features: bool) -> jax.Array:
        return values[:, None] if is_features == config.swap else values[None, :]

    feature, row = lay(features, True), lay(rows, False)
    mask = lay(is_feature, True) & lay(is_row, False)
    if config.split_in > 1:
        target = out_ref.at[jnp.full((1, 1), share), row, feature]
        pltriton.store(target, product, mask=mask)
        return
    if scale_refs:
        scale = pltriton.load(scale_refs[0].at[features], mask=is_feature, other=0.0)
        product = product * lay(scale, True)
    pltriton.store(out_ref.at[row, feature], product.astype(out_ref.dtype), mask=mask)


def linear_triton(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
    out_dtype: jnp.dtype,
    *,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """`linear` in Pallas-Triton."""
    num_rows, out_size = x.shape[0], weight.shape[0]
    block_rows = max(MIN_DOT, min(config.block_rows, next_power_of_2(num_rows)))
    is_split = config.split_in > 1
    dtype = jnp.float32 if is_split else out_dtype
    shape = (config.split_in, num_rows, out_size) if is_split else (num_rows, out_size)
    out: jax.Array = triton_call(
        functools.partial(_kernel, config=config, block_rows=block_rows),
        jax.ShapeDtypeStruct(shape, dtype),
        name="linear",
        grid=(pl.cdiv(out_size, config.block_out), pl.cdiv(num_rows, block_rows), config.split_in),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )(x, weight, *(() if scale is None else (scale,)) if not is_split else ())
    if not is_split:
        return out
    # A second pass, in a fixed order: sums by atomics would differ from run to run.
    total = out[0]
    for share in range(1, config.split_in):
        total = total + out[share]
    if scale is not None:
        total = total * scale[None, :]
    return total.astype(out_dtype)
