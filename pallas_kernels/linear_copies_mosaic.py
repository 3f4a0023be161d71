"""What the Mosaic GPU linear layer copies: tiles of weight and x, through a shared-memory ring."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_blocks import Ref, plgpu


class Ring(NamedTuple):
    """Tiles on their way, some of each, and the barriers of their places."""

    weight: Ref  # [stages, features, block_in]
    x: Ref  # [stages, rows, block_in]
    full: Ref  # both copies have arrived
    free: Ref  # all who multiply have used them, in all blocks that x was copied for

    @property
    def num_stages(self) -> int:
        stages: int = self.weight.shape[0]
        return stages


def tile_transforms(row_size: int, dtype: jnp.dtype) -> tuple[Any, ...]:
    """How a tile lies in shared memory; rows of odd sizes lie as they are."""
    swizzle = plgpu.find_swizzle(row_size * dtype.itemsize * 8)
    if swizzle == 16:
        return ()
    return (
        plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )


def ring_types(
    num_stages: int, num_features: int, num_rows: int, block_in: int,
    dtypes: tuple[jnp.dtype, jnp.dtype], num_groups: int, *, is_shared: bool,
) -> list[Any]:  # fmt: skip
    """Scratch types of the fields of `Ring`. dtypes: of weight and x; num_groups: who multiply."""
    free: Any = plgpu.Barrier(num_arrivals=num_groups, num_barriers=num_stages)
    if is_shared:
        free = plgpu.ClusterBarrier(
            collective_axes=("beside",), num_arrivals=num_groups, num_barriers=num_stages
        )
    tiles = [
        plgpu.SMEM(
            (num_stages, height, block_in), dtype, transforms=tile_transforms(block_in, dtype)
        )
        for height, dtype in zip((num_features, num_rows), dtypes, strict=True)
    ]
    return [*tiles, plgpu.Barrier(num_arrivals=2, num_barriers=num_stages), free]


def copy_tiles(
    ring: Ring, weight_ref: Ref, x_ref: Ref, first_feature: jax.Array, share: jax.Array,
    num_steps: int, *, is_shared: bool,
) -> None:  # fmt: skip
    """The copying warpgroup of a block: the tiles of its features and its share of the steps.

    is_shared: x is copied once for all blocks along the cluster's axis "beside".
    """
    _, num_features, block_in = ring.weight.shape
    features = pl.ds(first_feature, num_features)
    # from a traced start: what lies past the end reads as zeros
    rows = pl.ds(share * 0, ring.x.shape[1])

    def copy_step(step: jax.Array, _: None) -> None:
        slot = jax.lax.rem(step, jnp.int32(ring.num_stages))

        @pl.when(step >= ring.num_stages)
        def wait_until_used() -> None:
            plgpu.barrier_wait(ring.free.at[slot])

        columns, full = pl.ds((share * num_steps + step) * block_in, block_in), ring.full.at[slot]
        plgpu.copy_gmem_to_smem(weight_ref.at[features, columns], ring.weight.at[slot], full)
        plgpu.copy_gmem_to_smem(
            x_ref.at[rows, columns], ring.x.at[slot], full,
            collective_axes=("beside",) if is_shared else None,
        )  # fmt: skip

    jax.lax.fori_loop(0, num_steps, copy_step, None)
    for slot in range(ring.num_stages):  # every phase of a barrier is seen by who waits on it
        plgpu.barrier_wait(ring.free.at[slot])
