"""Quantised weights are what an oracle of plain numpy makes of them, on any number of devices."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from checkpoints.hf_weights import open_weights
from sloraj.model.quantize import quantize
from sloraj.model.weights import (
    abstract_parameters,
    flatten,
    load_parameters,
    random_parameters,
)
from sloraj.parallel.mesh import make_mesh
from sloraj.parallel.sharding import COLUMN, ROW
from tests.checkpoints.fixtures import tiny_config, write_hf_model
from tests.e2e.driver import quiet
from tests.oracle.numpy_quantize import e4m3_values, quantized

KINDS = ("int8", "fp8")


def hard_rows(quantization: str) -> np.ndarray:
    """Rows whose shares are ties, ends of the range, subnormals, zeros, and random numbers."""
    rng = np.random.default_rng(0)
    if quantization == "int8":
        ties = np.arange(-127, 128, dtype=np.float32)[::2] + np.float32(0.5)
        special = np.concatenate([ties, [127.0]])
    else:
        values = e4m3_values()
        special = np.concatenate([(values[1:] + values[:-1]) / 2, values[-1:], [2.0**-12]])
    special = np.resize(special, 256)
    random = rng.normal(size=(5, 256)) * 10.0 ** rng.integers(-6, 3, size=(5, 1))
    return np.concatenate([[special, -special, np.zeros(256)], random]).astype(np.float32)


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("spec", [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize("tp", [1, 4])
def test_each_row_is_rounded_to_the_nearest(quantization: str, spec: object, tp: int) -> None:
    weight = hard_rows(quantization)
    placed = jax.device_put(weight, NamedSharding(make_mesh(tp), spec))
    got, scale = quantize(placed, quantization)
    want, want_scale = quantized(weight, quantization)
    assert got.dtype == {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[quantization]
    np.testing.assert_allclose(np.asarray(scale), want_scale, rtol=1e-6)
    if quantization == "int8":  # a share that is a tie may be a hair beside it after the division
        assert np.abs(np.asarray(got, np.float64) - want).max() <= 1
        is_same = np.asarray(got, np.float64) == want
        assert is_same.mean() > 0.999
    else:
        np.testing.assert_array_equal(np.asarray(got).astype(np.float64), want)
    assert got.sharding.spec == spec


@pytest.mark.parametrize("quantization", KINDS)
def test_loaded_parameters_are_the_abstract_ones_and_equal_on_any_devices(
    quantization: str, tmp_path: Path
) -> None:
    config = tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True, num_kv_heads=4)
    write_hf_model(tmp_path, config, seed=3)
    rows: dict[int, dict[str, np.ndarray]] = {}
    for tp in (1, 2):
        mesh = make_mesh(tp)
        with open_weights(str(tmp_path), config) as weights:
            loaded = load_parameters(
                weights, config, mesh, jnp.dtype("bfloat16"), quiet, quantization
            )
        flat = flatten(*loaded)
        abstract = abstract_parameters(config, mesh, jnp.dtype("bfloat16"), quantization)
        random = random_parameters(config, mesh, jnp.dtype("bfloat16"), 0, quantization)
        for leaves in (flat, flatten(*random)):
            assert leaves.keys() == abstract.keys()
            for name, leaf in leaves.items():
                want = abstract[name]
                assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype), name
                assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim), name
        rows[tp] = {
            name: np.asarray(leaf).astype(np.float32)
            for name, leaf in flat.items()
            if name.split(".")[-1] in ("o", "o_scale", "down", "down_scale")
        }
    for name, leaf in rows[1].items():
        np.testing.assert_array_equal(leaf, rows[2][name])


@pytest.mark.parametrize("quantization", KINDS)
def test_stored_weights_are_quantised_before_any_cast(quantization: str, tmp_path: Path) -> None:
    config = tiny_config(dtype="float32")
    write_hf_model(tmp_path, config, seed=3)
    mesh = make_mesh(1)
    with open_weights(str(tmp_path), config) as weights:
        stored = weights.read("model.layers.1.mlp.down_proj.weight").copy()
        _, layers = load_parameters(
            weights, config, mesh, jnp.dtype("bfloat16"), quiet, quantization
        )
    want, scale = quantized(stored, quantization)
    np.testing.assert_array_equal(np.asarray(layers[1]["down"]).astype(np.float64), want)
    np.testing.assert_allclose(np.asarray(layers[1]["down_scale"]), scale, rtol=1e-6)
    assert layers[1]["input_norm"].dtype == jnp.bfloat16
