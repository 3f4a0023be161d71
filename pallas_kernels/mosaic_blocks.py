"""What the Pallas Mosaic GPU kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.adapter_layout import CHUNK
from pallas_kernels.triton_blocks import AdapterArrays

plgpu: Any = mosaic_gpu  # its types differ between JAX versions
MAX_BARRIERS = 32  # of one kind in a block
Ref = Any  # Pallas has no public type for the references that a kernel gets


def interpret_params(interpret: bool) -> Any:
    """What `plgpu.kernel` wants as `interpret`.

    Raises: NotImplementedError: this version of JAX has no public interpreter for Mosaic GPU.
    """
    if not interpret:
        return None
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError("the Mosaic GPU interpreter is public from JAX 0.11 on")
    return plgpu.InterpretGPUParams()


def whole_chunks(width: int) -> int:
    """Chunks of a row that has no partial one.

    Raises: ValueError: the width is not a multiple of 128.
    """
    if width % CHUNK:
        raise ValueError(f"width: got {width}, allowed: multiples of {CHUNK}")
    return width // CHUNK


class ChunkCopy(NamedTuple):
    """Copies runs of `size` chunks of one adapter into a ring in shared memory.

    A run in one page is one copy. A run that goes on in another page, which can lie anywhere, is
    copied chunk by chunk. The two kinds end at barriers of their own.
    """

    adapters: AdapterArrays  # with the pool as chunks, [num_pages * page_chunks, 128]
    slot: jax.Array  # of the adapter
    page_chunks: int
    size: int
    whole: Ref  # barriers of one arrival, one for each place in the ring
    single: Ref  # barriers of `arrivals` arrivals
    arrivals: int  # at least `size`

    def _is_whole(self, chunk: jax.Array) -> jax.Array:
        return jax.lax.rem(chunk, jnp.int32(self.page_chunks)) + self.size <= self.page_chunks

    def _pool_chunk(self, chunk: jax.Array) -> jax.Array:
        page_chunks = jnp.int32(self.page_chunks)
        page = self.adapters.slot_pages[self.slot, jax.lax.div(chunk, page_chunks)]
        place: jax.Array = page * page_chunks + jax.lax.rem(chunk, page_chunks)
        return place

    def start(self, chunk: jax.Array, smem: Ref, ring: jax.Array) -> None:
        """Copy the run that begins at `chunk` to `smem[ring]`."""
        is_whole = self._is_whole(chunk)

        @pl.when(is_whole)
        def copy_run() -> None:
            run = self.adapters.pool.at[pl.ds(self._pool_chunk(chunk), self.size)]
            plgpu.copy_gmem_to_smem(run, smem.at[ring, pl.ds(0, self.size)], self.whole.at[ring])

        @pl.when(~is_whole)
        def copy_chunks() -> None:
            def copy_chunk(i: jax.Array, _: None) -> None:
                i = jnp.minimum(i, self.size - 1)  # the last again, where more arrivals are due
                one = self.adapters.pool.at[pl.ds(self._pool_chunk(chunk + i), 1)]
                plgpu.copy_gmem_to_smem(one, smem.at[ring, pl.ds(i, 1)], self.single.at[ring])

            jax.lax.fori_loop(0, self.arrivals, copy_chunk, None)

    def wait(self, chunk: jax.Array, ring: jax.Array) -> None:
        """Until the run that begins at `chunk` is in `smem[ring]`."""
        is_whole = self._is_whole(chunk)
        pl.when(is_whole)(lambda: plgpu.barrier_wait(self.whole.at[ring]))
        pl.when(~is_whole)(lambda: plgpu.barrier_wait(self.single.at[ring]))
