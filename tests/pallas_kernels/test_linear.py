"""linear: meaning against float64 numpy, legality for CUDA, and the choice between the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_mosaic as mosaic
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
    out_dtype = jnp.dtype(jnp.float32 if sizes[0] == 5 else jnp.bfloat16)
    got = linear(
        x, w, scale, out_dtype=out_dtype,
        implementation="triton", config=make_config(**changes), interpret=True,
    )  # fmt: skip
    assert got.dtype == out_dtype
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
    for shape in (MODELS[name] for name in ("llama-3.1-8b", "demo")):
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
    keys = [tuning_key(rows, 64, 32, 1) for rows in (1, 2, 64, 65, 256, 9999)]
    assert keys[0] == "in=32,out=64,rows=1,weight_bytes=1"
    assert [key.split(",")[2] for key in keys[1:]] == [
        "rows=16", "rows=64", "rows=128", "rows=256", f"rows={MEASURED_ROWS[-1]}",
    ]  # fmt: skip


def test_unmeasured_shapes_use_xla_unless_a_weight_is_one_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(num_stages=4)
    key = tuning_key(3, 64, 32, 2)
    table = {"linear_triton": {key: {"config": _fields(config)}}}
    monkeypatch.setattr(tuning_table, "_table", lambda device: table)
    x, few, one_byte = bf16(3, 32), bf16(64, 32), array(64, 32, dtype=jnp.int8)
    for implementation in ("triton", "mosaic"):
        assert chosen_config(x, few, implementation) == config
        assert chosen_config(bf16(40, 32), few, implementation) is None
        assert isinstance(chosen_config(bf16(40, 32), one_byte, implementation), Config)
        assert chosen_config(bf16(257, 32), one_byte, implementation) is None
    large = array(4096, 4096, dtype=jnp.int8)
    assert isinstance(chosen_config(bf16(40, 4096), large, "mosaic"), mosaic.Config)
    assert isinstance(chosen_config(bf16(40, 4096), large, "triton"), Config)


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
    with pytest.raises(ValueError, match="'tpu' is not one that"):
        linear(x, w, scale, implementation="tpu")


needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels are written for JAX 0.11 and up"
)


def make_mosaic(**changes: Any) -> mosaic.Config:
    sizes = {"block_out": 64, "num_groups": 1, "block_in": 64, "split_in": 1, "num_beside": 1}
    return mosaic.Config(**(sizes | {"num_stages": 2, "swap": True} | changes))


@needs_mosaic
@pytest.mark.parametrize(
    ("weight", "sizes", "changes"),
    [
        ("bfloat16", (8, 128, 128), {}),
        ("bfloat16", (3, 128, 256), {}),  # rows past the end of x
        ("int8", (13, 128, 128), {}),
        ("bfloat16", (1, 192, 128), {"num_groups": 2}),  # features past the end of the weight
        ("bfloat16", (64, 96, 128), {"block_out": 32, "swap": False}),
        ("bfloat16", (64, 96, 512), {"block_out": 32, "swap": False, "leaves_room": True}),
        ("bfloat16", (5, 96, 192), {"block_out": 40, "swap": False}),
        ("int8", (8, 256, 128), {"num_groups": 2}),
        ("fp8", (16, 128, 192), {"num_beside": 2}),  # two blocks share the copies of x
        ("int8", (16, 128, 256), {"block_in": 128, "chunk_in": 64}),
    ],
)
def test_mosaic_kernel_agrees_with_the_oracle(
    weight: str, sizes: tuple[int, int, int], changes: dict[str, Any]
) -> None:
    x, w, scale, want = make_arrays(weight, sizes)
    got = linear(
        jnp.asarray(x), jnp.asarray(w), None if scale is None else jnp.asarray(scale),
        implementation="mosaic", config=make_mosaic(**changes), interpret=True,
    )  # fmt: skip
    assert got.dtype == jnp.bfloat16
    assert_close(got, want)


@pytest.mark.parametrize("weight", ["int8", "fp8"])
def test_widened_weights_are_exact(weight: str) -> None:
    w = np.arange(256, dtype=np.uint8).view(WEIGHTS[weight])
    got = np.asarray(mosaic.widened(jnp.asarray(w), jnp.dtype(jnp.bfloat16)))
    np.testing.assert_array_equal(got.astype(np.float32), w.astype(np.float32))


@needs_mosaic
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("num_rows", "sizes"),
    [(1, (4096, 12288)), (64, (11008, 4096)), (100, (4096, 22016)), (128, (4096, 28672))],
)
def test_mosaic_kernel_lowers(weight: str, num_rows: int, sizes: tuple[int, int]) -> None:
    in_size, out_size = sizes
    weight_bytes = jnp.dtype(WEIGHTS[weight]).itemsize
    config = mosaic.Config.heuristic(
        num_rows=num_rows, out_size=out_size, in_size=in_size, weight_bytes=weight_bytes
    )
    assert config is not None
    assert config.smem_bytes(num_rows, weight_bytes) <= mosaic.SMEM_BYTES

    def run(x: Any, w: Any, scale: Any) -> Any:
        scale = None if weight == "bfloat16" else scale
        return linear(x, w, scale, implementation="mosaic", config=config)

    arrays = array(out_size, in_size, dtype=WEIGHTS[weight]), array(out_size, dtype=jnp.float32)
    assert "mosaic_gpu" in lowered(run, bf16(num_rows, in_size), *arrays)


@needs_mosaic
@pytest.mark.parametrize("weight", ["int8", "fp8"])
def test_mosaic_kernel_that_converts_chunks_beside_products_lowers(weight: str) -> None:
    config = make_mosaic(
        block_in=256, chunk_in=128, num_groups=2, num_beside=2, split_in=2
    ).with_most_stages(64, 1)

    def run(x: Any, w: Any, scale: Any) -> Any:
        return linear(x, w, scale, implementation="mosaic", config=config)

    arrays = array(12288, 4096, dtype=WEIGHTS[weight]), array(12288, dtype=jnp.float32)
    assert "mosaic_gpu" in lowered(run, bf16(64, 4096), *arrays)


def test_blocks_that_could_not_work_are_refused() -> None:
    with pytest.raises(ValueError, match="num_groups: got 4, allowed: 1 to 3"):
        make_mosaic(num_groups=4)
    with pytest.raises(ValueError, match="chunk_in: got 48, allowed: parts of 64"):
        make_mosaic(chunk_in=48)


def test_the_mosaic_heuristic_says_what_it_cannot_serve() -> None:
    sizes = {"num_rows": 1, "out_size": 128, "in_size": 128, "weight_bytes": 1}
    assert mosaic.Config.heuristic(**sizes) is not None
    for change in ({"num_rows": 257}, {"out_size": 60}, {"in_size": 344}):
        assert mosaic.Config.heuristic(**(sizes | change)) is None


def test_every_entry_of_the_committed_tables_can_run() -> None:
    for path in Path(tuning_table.__file__).parent.glob("tuning/*.json"):
        table = json.loads(path.read_text())
        for key, entry in table.get("linear_mosaic", {}).items():
            sizes = dict(part.split("=") for part in key.split(","))
            config = mosaic.Config(**entry["config"])
            used = config.smem_bytes(int(sizes["rows"]), int(sizes["weight_bytes"]))
            assert used <= mosaic.SMEM_BYTES, key
            assert int(sizes["in"]) % (config.block_in * config.split_in) == 0, key
        for entry in table.get("linear_triton", {}).values():
            Config(**entry["config"])
