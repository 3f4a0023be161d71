"""lora_rows against a float64 oracle: gate (a), on the reference and the interpreted kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning_table
from pallas_kernels.lora_rows import chosen_config, lora_rows, table_key
from pallas_kernels.lora_rows_triton import Config
from pallas_kernels.shapes import POPULARITIES, row_slots
from tests.pallas_kernels.lora_case import MIXED, LoraCase, compiled, make_case
from tests.pallas_kernels.tolerances import assert_close

IMPLEMENTATIONS = ["xla", "triton"]
SMALL = Config(block_chunks=2, row_ranks=4, num_warps=4)


def run(
    case: LoraCase, out_sizes: dict[int, int], implementation: str, config: Config = SMALL
) -> tuple[np.ndarray, np.ndarray]:
    """(what came out, the oracle's answer)."""
    modules, sizes = tuple(out_sizes), tuple(out_sizes.values())
    max_rank = max((rank for ranks in case.ranks.values() for rank in ranks.values()), default=1)
    call = compiled(
        lora_rows, modules=modules, out_sizes=sizes, max_rank=max_rank,
        implementation=implementation, config=config if implementation == "triton" else None,
    )  # fmt: skip
    y = np.asarray(call(case.x, case.pool, case.slot_pages, np.int32(case.layer), case.tiles))
    assert y.dtype == np.float32
    return y, case.deltas(modules, sizes, max_rank)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_every_row_gets_the_delta_of_its_own_adapter_and_base_rows_zeros(
    implementation: str, popularity: str
) -> None:
    out_sizes = {0: 200, 1: 72, 2: 72}
    case = make_case(
        row_slots=row_slots(popularity, 9, len(MIXED), seed=3), ranks=MIXED, in_size=200,
        out_size=out_sizes, page_elems=1024, block_rows=1, dtype=jnp.bfloat16, seed=4,
    )  # fmt: skip
    y, want = run(case, out_sizes, implementation)
    assert_close(y, want)
    assert not y[case.row_slots == 0].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("in_size", "out_size", "page_elems", "dtype"),
    [
        (128, 128, 1024, np.float32),
        (896, 128, 1024, jnp.bfloat16),
        (128, 896, 4096, np.float16),
        (11008, 136, 4096, jnp.bfloat16),
        (64, 11008, 4096, jnp.bfloat16),
    ],
)
def test_rows_that_straddle_pages_are_read_from_their_own_pages(
    implementation: str, in_size: int, out_size: int, page_elems: int, dtype: Any
) -> None:
    out_sizes = {4: out_size, 5: out_size}
    case = make_case(
        row_slots=np.array([1, 2, 0, 1], np.int32), ranks={1: {4: 3, 5: 8}, 2: {5: 9}},
        in_size=in_size, out_size=out_sizes, page_elems=page_elems, block_rows=1, dtype=dtype,
        seed=out_size,
    )  # fmt: skip
    y, want = run(case, out_sizes, implementation)
    assert_close(y, want)
    assert not y[2].any()


@pytest.mark.parametrize(
    "config",
    [
        Config(block_chunks=1, row_ranks=1, num_warps=1),
        Config(block_chunks=4, row_ranks=8, num_warps=8),
        Config(block_chunks=32, row_ranks=2, num_warps=4, row_chunks=1),
    ],
)
def test_every_configuration_gives_the_same_answer(config: Config) -> None:
    out_sizes = {0: 328, 1: 136}
    case = make_case(
        row_slots=np.array([1, 2, 1, 0], np.int32), ranks={1: {0: 24, 1: 8}, 2: {0: 256}},
        in_size=320, out_size=out_sizes, page_elems=1024, block_rows=1, dtype=np.float32, seed=1,
    )  # fmt: skip
    assert_close(*run(case, out_sizes, "triton", config))


def test_impossible_arguments_are_refused() -> None:
    case = make_case(
        row_slots=np.array([1], np.int32), ranks={1: {0: 8}}, in_size=128, out_size={0: 128},
        page_elems=1024, block_rows=1, dtype=np.float32, seed=0,
    )  # fmt: skip
    arguments = (case.pool, case.slot_pages, np.int32(0))
    more: dict[str, Any] = {"modules": (0,), "out_sizes": (128,), "max_rank": 8}
    with pytest.raises(ValueError, match="'' is not one that this op has"):
        lora_rows(case.x, *arguments, case.tiles, implementation="", **more)
    with pytest.raises(ValueError, match="config: got None, allowed for triton: a configuration"):
        lora_rows(case.x, *arguments, case.tiles, implementation="triton", **more)
    several = dataclasses.replace(case.tiles, block_rows=2)
    with pytest.raises(ValueError, match="times 2 rows, allowed: one for each of the 1 rows"):
        lora_rows(case.x, *arguments, several, implementation="xla", **more)
    with pytest.raises(ValueError, match="but tiles order 1 rows"):
        lora_rows(case.x[:0], *arguments, case.tiles, implementation="xla", **more)
    with pytest.raises(ValueError, match="1 out_sizes for 2 modules"):
        lora_rows(
            case.x, *arguments, case.tiles, implementation="xla", **(more | {"modules": (0, 1)})
        )


def test_the_table_says_whether_one_kernel_serves_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    key = table_key(64, 4096, (4096, 4096, 4096))
    assert key == "num_modules=3,num_tokens=64,out=12288,width=4096"
    assert chosen_config(64, 4096, (4096,)) is None
    entry = {"config": dataclasses.asdict(SMALL), "us": 1.0}
    monkeypatch.setattr(tuning_table, "_table", lambda device: {"lora_rows": {key: entry}})
    assert chosen_config(64, 4096, (4096, 4096, 4096)) == SMALL
    assert chosen_config(16, 4096, (4096, 4096, 4096)) is None
