"""Mosaic GPU attention against the float64 oracle: gate (a), in the interpreter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_blocks import interpret_params
from pallas_kernels.paged_attention import paged_ragged_attention
from pallas_kernels.ragged_attention_mosaic import BLOCK_Q, Config
from tests.pallas_kernels.attention_case import make_contexts, make_query_tiles
from tests.pallas_kernels.tolerances import assert_close

NO_WINDOW = 2**31 - 1
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Mosaic GPU interpreter is public from JAX 0.11 on"
)
SPANS = [(2, 150, 150), (1, 0, 1), (0, 100, 40)]  # a cached prefix, one token, a tile cut short


@needs_interpreter
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "dtype", "window", "block_kv"),
    [
        (2, 1, 64, 16, jnp.bfloat16, NO_WINDOW, 128),
        (2, 1, 64, 16, jnp.bfloat16, 70, 64),
        (2, 2, 128, 8, np.float16, 100, 128),
    ],
)
def test_each_token_sees_what_came_before_it(
    heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: Any, window: int, block_kv: int
) -> None:
    contexts = make_contexts(
        lengths=[140, 1, 300], num_kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
        dtype=dtype, seed=3,
    )  # fmt: skip
    tiles, tokens = make_query_tiles(SPANS, block_q=BLOCK_Q, capacity=6)
    rng = np.random.default_rng(0)
    q = (3 * rng.normal(size=(len(tokens) + 2, heads, head_dim))).astype(dtype)
    base = rng.normal(size=q.shape).astype(dtype)
    out = paged_ragged_attention(
        jnp.asarray(q), jnp.asarray(contexts.pool), jnp.asarray(contexts.page_table),
        jax.tree.map(jnp.asarray, tiles), jnp.int32(window), jnp.asarray(base),
        num_kv_heads=kv_heads, page_size=page_size, scale=0.125, implementation="mosaic",
        config=Config(block_kv=block_kv), interpret=True,
    )  # fmt: skip
    attended = np.asarray(out)
    assert attended.dtype == q.dtype
    for t, token in enumerate(tokens):
        assert token is not None
        want = contexts.attention(q[t], *token, window, 0.125)
        assert_close(attended[t], want, inner=dtype)
    assert attended[len(tokens) :].tobytes() == base[len(tokens) :].tobytes()


def test_tiles_that_the_kernel_cannot_take_are_refused() -> None:
    contexts = make_contexts(
        lengths=[20], num_kv_heads=1, head_dim=64, page_size=16, dtype=jnp.bfloat16, seed=3
    )

    def attend(block_q: int, dtype: Any, page_size: int) -> None:
        tiles, _ = make_query_tiles([(0, 0, 20)], block_q=block_q, capacity=2)
        paged_ragged_attention(
            jnp.zeros((20, 2, 64), dtype),
            jnp.zeros((3, 2 * page_size * 64), jnp.bfloat16),
            contexts.page_table,
            tiles,
            jnp.int32(9),
            num_kv_heads=1,
            page_size=page_size,
            scale=1.0,
            implementation="mosaic",
        )

    with pytest.raises(ValueError, match="block_q: got 64, allowed: 128"):
        attend(64, jnp.bfloat16, 16)
    with pytest.raises(ValueError, match="got float32"):
        attend(128, jnp.float32, 16)
    with pytest.raises(ValueError, match="page_size: got 24"):
        attend(128, jnp.bfloat16, 24)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this JAX has the interpreter")
def test_without_an_interpreter_asking_for_it_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="public from JAX 0"):
        interpret_params(True)
