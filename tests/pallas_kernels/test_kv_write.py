"""kv_write: each token in its place, and nothing else changed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import kv_write


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "page_size", "dtype"),
    [(2, 32, 16, np.float32), (3, 80, 4, jnp.bfloat16), (1, 128, 1, np.float32)],
)
def test_tokens_land_in_their_places_and_nowhere_else(
    implementation: str, kv_heads: int, head_dim: int, page_size: int, dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    num_pages = 9
    before = rng.normal(size=(num_pages, 2, kv_heads, page_size, head_dim)).astype(dtype)
    k, v = rng.normal(size=(2, 6, kv_heads, head_dim)).astype(np.float32)
    pages = np.array([3, 0, 7, 5, 0, 8], np.int32)
    offsets = np.array([page_size - 1, 0, 0, page_size // 2, 0, 0], np.int32)

    @jax.jit
    def run(*arrays: Any) -> Any:
        return kv_write(
            *arrays,
            page_size=page_size,
            implementation=implementation,
            interpret=implementation == "triton",
        )

    got = run(before.reshape(num_pages, -1), k, v, pages, offsets)
    want = before.copy()
    for token, (page, offset) in enumerate(zip(pages, offsets, strict=True)):
        for head in range(kv_heads):
            want[page, 0, head, offset] = k[token, head].astype(dtype)
            want[page, 1, head, offset] = v[token, head].astype(dtype)
    assert got.dtype == dtype
    null_page_is_undefined = slice(1, None)
    np.testing.assert_array_equal(
        np.asarray(got)[null_page_is_undefined],
        want.reshape(num_pages, -1)[null_page_is_undefined],
    )


@pytest.mark.parametrize("num_tokens", [1, 2, 16])
def test_a_step_that_writes_and_then_reads_never_copies_the_pool(num_tokens: int) -> None:
    def step(pool: jax.Array, kv: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        pool = kv_write(pool, kv, kv, pages, pages, page_size=16, implementation="xla")
        return pool, pool.reshape(-1, 16, 128)[pages]

    pool = jax.ShapeDtypeStruct((512, 2048), jnp.float32)
    kv = jax.ShapeDtypeStruct((num_tokens, 2, 32), jnp.float32)
    pages = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(pool, kv, pages).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 2048 * 4 / 8


def test_impossible_arguments_are_refused() -> None:
    pool, kv, index = np.zeros((3, 512)), np.zeros((2, 2, 32)), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="not \\[num_pages, 2048\\]"):
        kv_write(pool, kv, kv, index, index, page_size=16, implementation="xla")
    with pytest.raises(ValueError, match="disagree"):
        kv_write(pool, kv, kv, index, index[:1], page_size=4, implementation="xla")
    with pytest.raises(ValueError, match="'tpu' is not one of"):
        kv_write(pool, kv, kv, index, index, page_size=4, implementation="tpu")
