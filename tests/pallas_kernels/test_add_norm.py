"""add_rms_norm: the sum and its norm, as written down in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm import add_rms_norm

EPS = 1e-5


def run(x: Any, delta: Any, weight: Any, implementation: str, lora: Any = None) -> Any:
    interpret = implementation == "triton"
    return jax.jit(
        lambda x, delta, weight, lora: add_rms_norm(
            x, delta, weight, EPS, lora, implementation=implementation, interpret=interpret
        )
    )(x, delta, weight, lora)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("width", [64, 896, 2048])
def test_sum_and_norm_agree_with_float64(implementation: str, width: int) -> None:
    rng = np.random.default_rng(0)
    x, delta = rng.normal(size=(2, 5, width)).astype(np.float32)
    x[3] = delta[3] = 0  # a padding row
    weight = rng.uniform(0.5, 1.5, width).astype(np.float32)
    total, normed = run(x, delta, weight, implementation)
    want = x.astype(np.float64) + delta
    np.testing.assert_allclose(total, want, rtol=1e-6, atol=1e-6)
    scale = 1 / np.sqrt((want**2).mean(axis=1, keepdims=True) + EPS)
    np.testing.assert_allclose(normed, want * scale * weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_bfloat16_answers_are_two_roundings_from_float64(implementation: str) -> None:
    rng = np.random.default_rng(1)
    x, delta = rng.normal(size=(2, 4, 896)).astype(jnp.bfloat16)
    weight = rng.uniform(0.5, 1.5, 896).astype(jnp.bfloat16)
    total, normed = run(x, delta, weight, implementation)
    assert total.dtype == normed.dtype == jnp.bfloat16
    want = np.asarray(x, np.float64) + np.asarray(delta, np.float64)
    np.testing.assert_allclose(np.asarray(total, np.float64), want, rtol=2**-8)
    scale = 1 / np.sqrt((want**2).mean(axis=1, keepdims=True) + EPS)
    want = want * scale * np.asarray(weight, np.float64)
    # the sum, the normed value and the product are each rounded
    np.testing.assert_allclose(np.asarray(normed, np.float64), want, rtol=3.1 * 2**-8)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_lora_rows", [4, 3])
def test_what_adapters_add_is_rounded_once_with_what_they_add_to(
    implementation: str, dtype: Any, num_lora_rows: int
) -> None:
    rng = np.random.default_rng(2)
    x, delta = rng.normal(size=(2, 4, 896)).astype(dtype)
    weight = rng.uniform(0.5, 1.5, 896).astype(dtype)
    lora = rng.normal(size=x.shape).astype(np.float32)
    lora[num_lora_rows:] = 0
    added = (delta.astype(np.float64) + lora).astype(np.float32).astype(dtype)
    lora = lora[:num_lora_rows]
    got = run(x, delta, weight, implementation, lora)
    want = run(x, added, weight, implementation)
    for one, other in zip(got, want, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_row_that_is_not_finite_stays_so_and_alone() -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 5] = np.nan
    for implementation in ("xla", "triton"):
        _, normed = run(x, np.zeros_like(x), np.ones(64, np.float32), implementation)
        assert np.isnan(np.asarray(normed)[1]).all()
        assert np.isfinite(np.asarray(normed)[[0, 2]]).all()


def test_impossible_arguments_are_refused() -> None:
    x, weight = np.zeros((2, 64), np.float32), np.zeros(64, np.float32)
    with pytest.raises(ValueError, match="disagree"):
        add_rms_norm(x, x[:1], weight, EPS, implementation="xla")
    with pytest.raises(ValueError, match="disagree"):
        add_rms_norm(x, x, weight.astype(jnp.bfloat16), EPS, implementation="xla")
    for lora in (x[:, :32], np.zeros((3, 64), np.float32), x[0]):
        with pytest.raises(ValueError, match="is not float32 \\(2, 64\\) or fewer rows"):
            add_rms_norm(x, x, weight, EPS, lora, implementation="xla")
    with pytest.raises(ValueError, match="'tpu' is not one that"):
        add_rms_norm(x, x, weight, EPS, implementation="tpu")
