"""rope_write: each head turned, each token in its place, and nothing else changed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope_write import HeadShape, rope_write
from tests.pallas_kernels.rope_case import make_rope_case, rope_oracle

SHAPES = [
    HeadShape(num_heads=4, num_kv_heads=2, head_dim=32, page_size=16),
    HeadShape(num_heads=9, num_kv_heads=3, head_dim=80, page_size=4),
    HeadShape(num_heads=12, num_kv_heads=12, head_dim=64, page_size=1),
]
EPS = 1e-5


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(("has_norms", "has_lora"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_turn_and_tokens_land_in_their_places_and_nowhere_else(
    implementation: str, has_norms: bool, has_lora: bool, shape: HeadShape
) -> None:
    case = make_rope_case(
        shape, num_tokens=7, has_norms=has_norms, dtype=np.float32, seed=1, has_lora=has_lora
    )

    @jax.jit
    def run(*arrays: Any) -> Any:
        return rope_write(
            *arrays,
            shape=shape,
            eps=EPS,
            implementation=implementation,
            interpret=implementation == "triton",
        )

    q, pool = run(*case)
    want_q, want_pool = rope_oracle(case, shape, EPS)
    real = case.pages != 0
    np.testing.assert_allclose(np.asarray(q)[real], want_q[real], rtol=2e-5, atol=2e-5)
    null_page_is_undefined = slice(1, None)
    got, want = np.asarray(pool)[null_page_is_undefined], want_pool[null_page_is_undefined]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    untouched = want == case.pool[null_page_is_undefined]
    np.testing.assert_array_equal(got[untouched], case.pool[null_page_is_undefined][untouched])


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("has_lora", [False, True])
def test_bfloat16_answers_are_rounded_and_no_worse(
    implementation: str, has_norms: bool, has_lora: bool
) -> None:
    shape = SHAPES[0]
    case = make_rope_case(
        shape, num_tokens=6, has_norms=has_norms, dtype=jnp.bfloat16, seed=2, has_lora=has_lora
    )
    q, pool = jax.jit(
        lambda *arrays: rope_write(
            *arrays,
            shape=shape,
            eps=EPS,
            implementation=implementation,
            interpret=implementation == "triton",
        )
    )(*case)
    want_q, want_pool = rope_oracle(case, shape, EPS)
    assert q.dtype == pool.dtype == jnp.bfloat16
    real = case.pages != 0
    # a turned value is the difference of two that norms round before: relative to the largest
    for got, want in ((q[real], want_q[real]), (pool[1:], want_pool[1:])):
        error = np.abs(np.asarray(got, np.float64) - want)
        assert (error <= 2**-8 * (np.abs(want) + 2 * has_norms * np.abs(want).max())).all()


@pytest.mark.parametrize("num_tokens", [1, 2, 16])
def test_a_step_that_writes_and_then_reads_never_copies_the_pool(num_tokens: int) -> None:
    shape = HeadShape(num_heads=2, num_kv_heads=2, head_dim=32, page_size=16)

    def step(pool: jax.Array, qkv: jax.Array, angle: jax.Array, pages: jax.Array) -> Any:
        q, pool = rope_write(
            qkv, pool, angle, angle, pages, pages, shape=shape, implementation="xla"
        )
        return pool, q, pool.reshape(-1, 16, 128)[pages]

    pool = jax.ShapeDtypeStruct((512, 2048), jnp.float32)
    qkv = jax.ShapeDtypeStruct((num_tokens, shape.width), jnp.float32)
    angle = jax.ShapeDtypeStruct((num_tokens, 16), jnp.float32)
    pages = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(pool, qkv, angle, pages).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 2048 * 4 / 8


def test_impossible_arguments_are_refused() -> None:
    shape = HeadShape(num_heads=4, num_kv_heads=2, head_dim=32, page_size=4)
    case = make_rope_case(shape, num_tokens=2, has_norms=False, dtype=np.float32, seed=0)

    def run(implementation: str = "xla", **changes: Any) -> None:
        arguments: Any = case._replace(**changes)
        rope_write(*arguments, shape=shape, implementation=implementation)

    with pytest.raises(ValueError, match="not \\[num_pages, 512\\]"):
        run(pool=np.zeros((3, 100), np.float32))
    with pytest.raises(ValueError, match="disagree"):
        run(offsets=case.offsets[:1])
    with pytest.raises(ValueError, match="disagree"):
        run(qkv=case.qkv[:, 1:])
    with pytest.raises(ValueError, match="head_dim / 2"):
        run(cos=case.cos[:, 1:])
    with pytest.raises(ValueError, match="lora float64"):
        run(lora=case.qkv.astype(np.float64))
    with pytest.raises(ValueError, match="'tpu' is not one that"):
        run("tpu")
