"""Linear layer of few rows in Pallas Mosaic GPU (Hopper): weights stream through wgmma once.

A block owns some output features and one share of the input features. One warpgroup copies tiles
into a ring in shared memory, the others multiply. Two things keep the memory the only limit: x is
copied once for several blocks beside each other (a multicast within their cluster), for at 64 rows
it would come from the cache as often as the weight comes from memory; and the blocks that share
one output add up through each other's shared memory, in a fixed order, with no second kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_copies_mosaic import Ring, copy_tiles, ring_types, tile_transforms
from pallas_kernels.mosaic_blocks import Ref, interpret_params, plgpu

MIN_ROWS = 8  # of a tile of x: the narrow side of a wgmma
WGMMA_ROWS = 64  # the wide side
MAX_ROWS = 256  # of the narrow side
SMEM_BYTES = 227 * 1024 - 1024  # of a block, less what barriers take
MAX_GROUPS = 3
COPY_REGISTERS = 40  # of a thread that copies
NUM_BLOCKS = 132  # that run at once on an H100 or H200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one block works."""

    block_out: int  # output features of a compute warpgroup
    num_groups: int  # compute warpgroups of a block, beside each other in output features
    block_in: int  # input features in a step of the loop
    split_in: int  # blocks (one cluster) that share the input features
    num_beside: int  # blocks of a cluster that share the copies of x
    num_stages: int
    swap: bool  # weights on the wide side of the product, x on the narrow one
    # One-byte weights are converted so many input features at a time (0: a step's), the next ones
    # while the product of those before runs.
    chunk_in: int = 0
    # A block that deals its registers out among its warpgroups owns all of a multiprocessor's, and
    # nothing runs beside it. One that leaves room has as many a thread as its code needs.
    leaves_room: bool = False

    def __post_init__(self) -> None:
        # More groups than this would want more registers than there are, and wait for ever.
        if self.num_groups > MAX_GROUPS:
            raise ValueError(f"num_groups: got {self.num_groups}, allowed: 1 to {MAX_GROUPS}")
        if self.chunk_in and self.block_in % self.chunk_in:
            raise ValueError(f"chunk_in: got {self.chunk_in}, allowed: parts of {self.block_in}")

    @property
    def compute_registers(self) -> int:
        """Of a thread that multiplies, where a block has all registers: a multiple of 8."""
        return min(256, (512 - COPY_REGISTERS) // self.num_groups // 8 * 8)

    def block_rows(self, num_rows: int) -> int:
        """Rows of a tile of x: all of them."""
        unit = MIN_ROWS if self.swap else WGMMA_ROWS
        return pl.cdiv(num_rows, unit) * unit

    def smem_bytes(self, num_rows: int, weight_bytes: int, out_bytes: int = 2) -> int:
        """Shared memory of a block, for an x of two bytes an element."""
        rows, block_out = self.block_rows(num_rows), self.block_out * self.num_groups
        stage = self.block_in * (block_out * weight_bytes + rows * 2)
        parts = (self.split_in - 1) * block_out * rows * 4
        return self.num_stages * stage + parts + block_out * rows * out_bytes

    def with_most_stages(self, num_rows: int, weight_bytes: int) -> Config | None:
        """The deepest ring that fits, up to 8 steps; None where not even two do."""
        for stages in range(8, 1, -1):
            deeper = dataclasses.replace(self, num_stages=stages)
            if deeper.smem_bytes(num_rows, weight_bytes) <= SMEM_BYTES:
                return deeper
        return None

    @classmethod
    def heuristic(
        cls, *, num_rows: int, out_size: int, in_size: int, weight_bytes: int
    ) -> Config | None:
        """A reasonable choice where nothing was measured; None where the kernel cannot serve.

        As many blocks as run at once, or a little fewer, of as many groups as that takes.
        """
        if num_rows > MAX_ROWS or out_size % MIN_ROWS:
            return None
        found: list[tuple[float, Config]] = []
        for block_out, groups in ((64, 1), (64, 2), (64, 3), (128, 2)):
            for split in (1, 2, 4):
                if (
                    out_size % block_out
                    or in_size % (128 * split)
                    or (block_out > WGMMA_ROWS and num_rows > WGMMA_ROWS)
                ):
                    continue
                config = cls(
                    block_out=block_out, num_groups=groups, block_in=128, split_in=split,
                    num_beside=1, num_stages=2, swap=True,
                ).with_most_stages(num_rows, weight_bytes)  # fmt: skip
                if config is not None:
                    blocks = pl.cdiv(out_size, groups * block_out) * split
                    waves = pl.cdiv(blocks, NUM_BLOCKS)
                    fill = blocks / (waves * NUM_BLOCKS)
                    found.append((fill - 0.02 * split - 0.05 * waves, config))
        return max(found, key=lambda rated: rated[0])[1] if found else None


def widened(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """One-byte weights as x's dtype, exactly; float8 has no direct way on Hopper."""
    if weight.dtype == jnp.float8_e4m3fn:
        weight = weight.astype(jnp.float16).astype(jnp.float32)
    return weight.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Where one block works: its output features, and its share of the input features."""

    config: Config
    num_rows: int  # of a tile of x
    first: jax.Array  # output feature
    share: jax.Array
    group: jax.Array  # this warpgroup; the last one copies

    @property
    def size(self) -> int:
        return self.config.block_out * self.config.num_groups

    @property
    def features(self) -> Any:
        """Of this warpgroup, in the output."""
        return pl.ds(self.first + self.group * self.config.block_out, self.config.block_out)

    @property
    def rows(self) -> Any:
        """All, from a traced start: what lies past the end reads as zeros and is not written."""
        return pl.ds(self.share * 0, self.num_rows)

    @property
    def sums_shape(self) -> tuple[int, int]:
        wide, narrow = self.config.block_out, self.num_rows
        return (wide, narrow) if self.config.swap else (narrow, wide)


def _multiply(block: _Block, weight: Ref, x: Ref, sums: Ref) -> None:
    """One step of the loop, for the features of this warpgroup."""
    config = block.config
    weight = weight.at[pl.ds(block.group * config.block_out, config.block_out)]
    width = config.chunk_in or config.block_in
    for first in range(0, config.block_in, width):
        columns = slice(None) if width == config.block_in else pl.ds(first, width)
        w, rows = weight.at[:, columns], x.at[:, columns]
        if weight.dtype != x.dtype:
            plgpu.wgmma(sums, widened(w[...], x.dtype), rows.T)
        elif config.swap:
            plgpu.wgmma(sums, w, rows.T)
        else:
            plgpu.wgmma(sums, rows, w.T)
    plgpu.wgmma_wait(0)


def _finish(block: _Block, sums: jax.Array, scale_refs: list[Ref], out: Ref, smem: Ref) -> None:
    """Scale the sums and write them."""
    swap = block.config.swap
    if scale_refs:
        features = block.features
        # groups past the end, whose sums are not written, read the last scales
        last = scale_refs[0].shape[0] - features.size
        scale = plgpu.load(
            scale_refs[0].at[pl.ds(jnp.minimum(features.start, last), features.size)],
            layout=plgpu.Layout.WGMMA.reduce(1 if swap else 0), optimized=False,
        )  # fmt: skip
        sums = sums * jax.lax.broadcast_in_dim(scale, sums.shape, [0 if swap else 1])
    rounded = sums.astype(out.dtype)
    if swap:
        smem.at[block.group].T[...] = plgpu.layout_cast(rounded, plgpu.Layout.WGMMA_TRANSPOSED)
    else:
        smem.at[block.group][...] = rounded
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.at[block.group], out.at[block.rows, block.features])
    plgpu.wait_smem_to_gmem(0)


def _add_up(block: _Block, sums: jax.Array, parts: Ref, full: Ref, finish: Any) -> None:
    """Bring the sums of all shares to the first one's block, which adds them in their order."""
    group = block.group

    @pl.when(block.share > 0)
    def send() -> None:
        plgpu.async_store_smem(
            sums, parts.at[block.share - 1, group], full.at[group],
            cluster_idx=jnp.int32(0), cluster_dim="share", optimized=False,
        )  # fmt: skip

    @pl.when(block.share == 0)
    def add() -> None:
        plgpu.barrier_wait(full.at[group])
        total = sums
        for part in range(block.config.split_in - 1):
            total = total + plgpu.load(
                parts.at[part, group], layout=plgpu.Layout.WGMMA, optimized=False
            )
        finish(total)


def _kernel(x_ref: Ref, weight_ref: Ref, *refs: Ref, config: Config, block_rows: int) -> None:
    *scale_refs, out_ref, out_smem, parts_smem, parts_full = refs[:-4]
    ring = Ring(*refs[-4:])
    tile = jax.lax.axis_index("tile") * config.num_beside + jax.lax.axis_index("beside")
    block = _Block(
        config=config, num_rows=block_rows, first=tile * (config.block_out * config.num_groups),
        share=jax.lax.axis_index("share"), group=jax.lax.axis_index("group"),
    )  # fmt: skip
    num_steps = x_ref.shape[1] // config.split_in // config.block_in

    def accumulate(sums_ref: Ref) -> None:
        def multiply(step: jax.Array, _: None) -> None:
            slot = jax.lax.rem(step, jnp.int32(ring.num_stages))
            plgpu.barrier_wait(ring.full.at[slot])
            _multiply(block, ring.weight.at[slot], ring.x.at[slot], sums_ref)
            plgpu.barrier_arrive(ring.free.at[slot])

        jax.lax.fori_loop(0, num_steps, multiply, None)
        sums = plgpu.layout_cast(sums_ref[...], plgpu.Layout.WGMMA)
        finish = functools.partial(
            _finish, block, scale_refs=scale_refs, out=out_ref, smem=out_smem
        )
        if config.split_in == 1:
            finish(sums)
        else:
            _add_up(block, sums, parts_smem, parts_full, finish)

    @pl.when(block.group < config.num_groups)
    def compute() -> None:
        if not config.leaves_room:
            plgpu.set_max_registers(config.compute_registers, action="increase")
        pl.run_scoped(accumulate, plgpu.ACC(block.sums_shape, jnp.float32))

    @pl.when(block.group == config.num_groups)
    def copy() -> None:
        if not config.leaves_room:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy_tiles(
            ring, weight_ref, x_ref, block.first, block.share, num_steps,
            is_shared=config.num_beside > 1,
        )  # fmt: skip


def linear_mosaic(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None,
    out_dtype: jnp.dtype,
    *,
    config: Config,
    interpret: bool = False,
) -> jax.Array:
    """`linear` in Mosaic GPU."""
    (num_rows, in_size), out_size = x.shape, weight.shape[0]
    partial = scale is not None and out_size % config.block_out
    if partial or in_size % (config.split_in * config.block_in) or num_rows > MAX_ROWS:
        raise NotImplementedError(f"x {x.shape} and weight {weight.shape} with {config}")
    out_dtype = jnp.dtype(out_dtype)
    if num_rows > MIN_ROWS and num_rows % MIN_ROWS:  # a copy takes fewer rows than 8, or whole 8s
        padded = jnp.pad(x, ((0, -num_rows % MIN_ROWS), (0, 0)))
        return linear_mosaic(padded, weight, scale, out_dtype, config=config, interpret=interpret)[
            :num_rows
        ]
    if interpret:  # the interpreter's wgmma takes no operand from registers
        weight = weight.astype(x.dtype)
    block_rows = config.block_rows(num_rows)
    block_size = config.block_out * config.num_groups
    sums_shape = (config.block_out, block_rows) if config.swap else (block_rows, config.block_out)
    num_parts = max(1, config.split_in - 1)
    split = config.split_in > 1
    num_steps = in_size // (config.split_in * config.block_in)
    out: jax.Array = plgpu.kernel(
        functools.partial(_kernel, config=config, block_rows=block_rows),
        out_type=jax.ShapeDtypeStruct((num_rows, out_size), out_dtype),
        grid=(pl.cdiv(out_size, block_size * config.num_beside),),
        grid_names=("tile",),
        cluster=(config.num_beside, config.split_in),
        cluster_names=("beside", "share"),
        num_threads=config.num_groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        scratch_types=[
            plgpu.SMEM(
                (config.num_groups, block_rows, config.block_out), out_dtype,
                transforms=tile_transforms(config.block_out, out_dtype),
            ),
            plgpu.SMEM((num_parts, config.num_groups, *sums_shape) if split else (8,), jnp.float32),
            plgpu.Barrier(num_arrivals=num_parts, num_barriers=config.num_groups),
            *ring_types(
                min(config.num_stages, num_steps), block_size, block_rows, config.block_in,
                (weight.dtype, x.dtype), config.num_groups, is_shared=config.num_beside > 1,
            ),
        ],
        kernel_name="linear",
        interpret=interpret_params(interpret),
    )(x, weight, *(() if scale is None else (scale,)))  # fmt: skip
    return out
