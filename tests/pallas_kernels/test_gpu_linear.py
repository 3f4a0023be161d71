"""Gate (c) of the linear layer: compiled on a GPU, at real shapes, against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_mosaic as mosaic
from pallas_kernels.linear import MAX_UNMEASURED_ROWS, linear
from tests.pallas_kernels.tolerances import assert_close, tensor_core_accumulation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]
WEIGHTS = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
CASES = [  # rows, (out, in): an entry of the table, none, rows and features that end in a tile
    (1, (12288, 4096)),
    (64, (4096, 4096)),
    (64, (4096, 11008)),
    (100, (22016, 4096)),
    (64, (28672, 4096)),
]
EVERY = 61  # output features that are compared, of all; and the last


def is_hopper() -> bool:
    return "H100" in jax.devices()[0].device_kind or "H200" in jax.devices()[0].device_kind


def check(weight: str, sizes: tuple[int, int], num_rows: int, **keywords: Any) -> None:
    """The op agrees with float64 on some output features, and with itself on all."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_rows, sizes[1])).astype(jnp.bfloat16))
    bits = jax.random.randint(jax.random.key(1), sizes, -127, 128, jnp.int8)
    w = bits if weight == "int8" else (bits.astype(jnp.bfloat16) / 64).astype(WEIGHTS[weight])
    scale = jnp.asarray(rng.uniform(0.5, 2, sizes[0]).astype(np.float32))
    arrays = (x, w) if weight == "bfloat16" else (x, w, scale)
    run = jax.jit(lambda *arrays: linear(*arrays, **keywords))
    got = np.asarray(run(*arrays))
    assert got.tobytes() == np.asarray(run(*arrays)).tobytes()
    places = np.append(np.arange(0, sizes[0], EVERY), sizes[0] - 1)
    want = np.asarray(x, np.float64) @ np.asarray(w[places].astype(jnp.float32), np.float64).T
    if weight != "bfloat16":
        want = want * np.asarray(scale, np.float64)[places]
    rounds_twice = weight != "bfloat16" and num_rows > MAX_UNMEASURED_ROWS  # before the scale too
    assert_close(
        got[:, places],
        want,
        inner=jnp.bfloat16 if rounds_twice else np.float32,
        accumulation=tensor_core_accumulation(sizes[1]),
    )


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("num_rows", "sizes"), CASES)
def test_what_a_hopper_runs_agrees_with_the_oracle(
    weight: str, num_rows: int, sizes: tuple[int, int]
) -> None:
    if not is_hopper():
        pytest.skip("wgmma is Hopper's")
    check(weight, sizes, num_rows, implementation="mosaic")


@pytest.mark.parametrize("weight", ["int8", "fp8"])
@pytest.mark.parametrize("num_rows", [3, 64, 600])
def test_what_other_devices_run_agrees_with_the_oracle(weight: str, num_rows: int) -> None:
    check(weight, (6144, 4096), num_rows, implementation="triton")


@pytest.mark.parametrize(
    ("weight", "changes"),
    [
        ("int8", {"split_in": 4}),
        ("int8", {"split_in": 2, "num_beside": 2, "num_groups": 3}),
        (
            "int8",
            {"split_in": 2, "num_beside": 2, "num_groups": 2, "block_in": 256, "chunk_in": 128},
        ),
        ("fp8", {"num_groups": 2, "block_in": 256, "chunk_in": 128, "num_stages": 3}),
        ("fp8", {"block_out": 128, "num_beside": 2}),
        ("bfloat16", {"split_in": 2, "block_out": 40, "num_groups": 1, "swap": False}),
        ("bfloat16", {"num_beside": 2, "block_out": 32, "swap": False, "leaves_room": True}),
    ],
)
def test_blocks_that_work_together_agree_with_the_oracle(
    weight: str, changes: dict[str, Any]
) -> None:
    if not is_hopper():
        pytest.skip("clusters are Hopper's")
    config = mosaic.Config(
        block_out=64, num_groups=2, block_in=128, split_in=1, num_beside=1, num_stages=2, swap=True
    )
    config = dataclasses.replace(config, **changes)
    # 4352 output features: the last blocks lie partly past the end
    num_rows = 40 if config.num_beside == 1 else 64  # tiles of 8 rows are dealt out to the blocks
    check(weight, (4352, 4096), num_rows, implementation="mosaic", config=config)
