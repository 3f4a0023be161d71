"""linear: meaning against float64 numpy, legality for CUDA, and the choice between the two."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning_table
from pallas_kernels.linear import MEASURED_ROWS, chosen_config, linear, tuning_key
from pallas_kernels.linear_triton import Config
from pallas_kernels.shapes import MODELS
from tests.pallas_kernels.test_legality import TRITON, array, bf16, lowered
from tests.pallas_kernels.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
WEIGHTS = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def make_arrays(weight: str, sizes: tuple[int, int, int], seed: int = 0) -> tuple[Any, ...]:
    """(x, weight, scale or None, the product in float64) of (rows, out, in)."""
    num_rows, out_size, in_size = sizes
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, in_size)).astype(jnp.bfloat16)
    w = (30 * rng.normal(size=(out_size, in_size))).clip(-127, 127).astype(np.float32)
    w = np.rint(w).astype(np.int8) if weight == "int8" else w.astype(WEIGHTS[weight])
    scale = None if weight == "bfloat16" else rng.uniform(1e-4, 1, out_size).astype(np.float32)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    return x, w, scale, want if scale is None else want * scale.astype(np.float64)


def make_config(**changes: Any) -> Config:
    sizes = {"block_out": 64, "block_in": 64, "split_in": 1, "block_rows": 128}
    return Config(**(sizes | {"num_warps": 4, "num_stages": 3} | changes))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ((1, 64, 128), {}),  # everything fits
        ((5, 200, 344), {}),  # nothing does
        ((5, 200, 344), {"split_in": 4}),  # shares of unequal length
        ((3, 64, 64), {"split_in": 2}),  # one of them empty
        ((40, 128, 192), {"block_rows": 16}),
        ((40, 96, 160), {"swap": False, "split_in": 2}),
    ],
)
def test_kernel_agrees_with_the_oracle(
    weight: str, sizes: tuple[int, int, int], changes: dict[str, Any]
) -> None:
    x, w, scale, want = make_arrays(weight, sizes)
    for out_dtype in (None, jnp.float32):
        got = linear(
            x, w, scale, out_dtype=out_dtype,
            implementation="triton", config=make_config(**changes), interpret=True,
        )  # fmt: skip
        assert got.dtype == (out_dtype or jnp.bfloat16)
        assert_close(got, want)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_reference_agrees_with_the_oracle(weight: str) -> None:
    x, w, scale, want = make_arrays(weight, (5, 200, 344))
    assert_close(linear(x, w, scale, implementation="xla"), want)
    got = linear(x, w, scale, out_dtype=jnp.float32, implementation="xla")
    assert got.dtype == jnp.float32
    assert_close(got, want)


@pytest.mark.parametrize("weight", ["int8", "fp8"])
def test_every_byte_is_converted_exactly(weight: str) -> None:
    w = np.arange(256, dtype=np.uint8).view(WEIGHTS[weight]).reshape(4, 64)
    w = np.where(np.isnan(w.astype(np.float32)), np.zeros_like(w), w)
    x, scale = np.eye(64, dtype=jnp.bfloat16), np.ones(4, np.float32)
    config = make_config(block_in=64)
    got = linear(x, w, scale, implementation="triton", config=config, interpret=True)
    np.testing.assert_array_equal(np.asarray(got, np.float32).T, w.astype(np.float32))


def layer_shapes() -> list[tuple[int, int]]:
    found = set()
    for shape in (MODELS[name] for name in ("llama-3.1-8b", "qwen2-0.5b", "demo")):
        q, k, v = (shape.module_sizes(module)[1] for module in range(3))
        out, gate, down = (shape.module_sizes(module) for module in (3, 4, 6))
        found |= {(shape.hidden_size, q + k + v), out, (gate[0], 2 * gate[1]), down}
    return sorted(found)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("num_rows", [1, 64])
@pytest.mark.parametrize("sizes", layer_shapes(), ids=str)
def test_kernel_lowers(weight: str, num_rows: int, sizes: tuple[int, int]) -> None:
    in_size, out_size = sizes
    config = Config.heuristic(num_rows=num_rows, out_size=out_size, in_size=in_size)

    def run(x: Any, w: Any, scale: Any) -> Any:
        scale = None if weight == "bfloat16" else scale
        return linear(x, w, scale, implementation="triton", config=config)

    arrays = array(out_size, in_size, dtype=WEIGHTS[weight]), array(out_size, dtype=jnp.float32)
    assert TRITON in lowered(run, bf16(num_rows, in_size), *arrays)


def test_each_number_of_rows_has_an_entry_that_serves_it() -> None:
    keys = [tuning_key(rows, 64, 32, jnp.dtype("int8")) for rows in (1, 2, 64, 65, 256, 9999)]
    assert keys[0] == "in=32,out=64,rows=1,weight=int8"
    assert [key.split(",")[2] for key in keys[1:]] == [
        "rows=16", "rows=64", "rows=128", "rows=256", f"rows={MEASURED_ROWS[-1]}",
    ]  # fmt: skip


def test_unmeasured_shapes_use_xla_unless_a_weight_is_one_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(num_stages=4)
    key = tuning_key(3, 64, 32, jnp.dtype("bfloat16"))
    table = {"linear": {key: {"config": {"num_stages": 4, **_fields(config)}}}}
    monkeypatch.setattr(tuning_table, "_table", lambda device: table)
    assert chosen_config(bf16(3, 32), bf16(64, 32)) == config
    assert chosen_config(bf16(40, 32), bf16(64, 32)) is None
    assert chosen_config(bf16(40, 32), array(64, 32, dtype=jnp.int8)) is not None


def _fields(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in Config.__dataclass_fields__}


def test_impossible_arguments_are_refused() -> None:
    x, w, scale, _ = make_arrays("int8", (2, 8, 16))
    for arguments, message in [
        ((x, w[:, :8], scale), "are not"),
        ((x, w, None), "one-byte weights have one"),
        ((x, w.astype(jnp.bfloat16), scale), "one-byte weights have one"),
        ((x, w, scale[:4]), "does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear(*arguments, implementation="xla")
    with pytest.raises(ValueError, match="'tpu' is not one of"):
        linear(x, w, scale, implementation="tpu")
