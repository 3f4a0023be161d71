"""lora_shrink against a float64 oracle: gate (a), on the reference and the interpreted kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_blocks
from pallas_kernels.lora_shrink import lora_shrink
from pallas_kernels.lora_shrink_triton import Config
from pallas_kernels.shapes import POPULARITIES, row_slots
from tests.pallas_kernels.lora_case import MIXED, LoraCase, compiled, make_case
from tests.pallas_kernels.tolerances import assert_close

IMPLEMENTATIONS = ["xla", "triton", "bmm"]
OUT = {module: 72 for module in range(7)}


def shrink(
    case: LoraCase,
    *,
    modules: tuple[int, ...],
    num_rows: int,
    rank_split: int = 1,
    **keywords: Any,
) -> Any:
    run = compiled(
        lora_shrink, modules=modules, num_rows=num_rows, rank_split=rank_split, **keywords
    )
    v = run(case.x, case.pool, case.slot_pages, np.int32(case.layer), case.tiles)
    assert v.shape == (len(case.row_slots), len(modules), num_rows)
    assert v.dtype == jnp.float32
    return np.asarray(v)


def assert_is_oracle(v: np.ndarray, case: LoraCase, modules: tuple[int, ...]) -> None:
    answers = case.shrunk(modules)
    for (row, place), want in answers.items():
        assert_close(v[row, place, : len(want)], want)
    assert bool(answers) == any(int(slot) for slot in case.row_slots)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("block_rows", [1, 4])
def test_every_row_is_projected_by_its_own_adapter(
    implementation: str, popularity: str, block_rows: int
) -> None:
    case = make_case(
        row_slots=row_slots(popularity, 9, len(MIXED), seed=3),
        ranks=MIXED,
        in_size=328,
        out_size=OUT,
        page_elems=1024,
        block_rows=block_rows,
        dtype=np.float32,
        seed=block_rows,
    )
    v = shrink(case, modules=(0, 1, 2), num_rows=64, implementation=implementation)
    assert_is_oracle(v, case, (0, 1, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("in_size", "page_elems", "dtype"),
    [
        (128, 1024, np.float32),
        (896, 1024, jnp.bfloat16),
        (896, 4096, np.float16),
        (11008, 4096, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("block_rows", [1, 2])
def test_rows_that_straddle_pages_are_read_from_their_own_pages(
    implementation: str, in_size: int, page_elems: int, dtype: Any, block_rows: int
) -> None:
    case = make_case(
        row_slots=np.array([1, 2, 0, 1], np.int32),
        ranks={1: {0: 3, 5: 8}, 2: {5: 9}},
        in_size=in_size,
        out_size=OUT,
        page_elems=page_elems,
        block_rows=block_rows,
        dtype=dtype,
        seed=in_size,
    )
    v = shrink(case, modules=(0, 5), num_rows=9, implementation=implementation)
    assert_is_oracle(v, case, (0, 5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank_split", [2, 4])
def test_a_device_shrinks_with_its_share_of_the_rank_rows(
    implementation: str, rank_split: int
) -> None:
    case = make_case(
        row_slots=np.array([1, 2, 3, 1, 2], np.int32),
        ranks={1: {0: 12, 1: 7}, 2: {0: 24, 1: 4}, 3: {0: 1}},
        in_size=256,
        out_size=OUT,
        page_elems=1024,
        block_rows=4,
        dtype=np.float32,
        seed=rank_split,
        rank_split=rank_split,
    )
    v = shrink(
        case,
        modules=(0, 1),
        num_rows=24 // rank_split,
        rank_split=rank_split,
        implementation=implementation,
    )
    assert_is_oracle(v, case, (0, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_rows", [1, 4])
def test_tiles_may_be_of_the_first_rows_alone(implementation: str, block_rows: int) -> None:
    case = make_case(
        row_slots=np.array([1, 2, 0, 1, 2], np.int32),
        ranks={1: {0: 8}, 2: {0: 5}},
        in_size=256,
        out_size=OUT,
        page_elems=1024,
        block_rows=block_rows,
        dtype=np.float32,
        seed=1,
    )
    others = np.full((3, 256), np.nan, np.float32)
    longer = dataclasses.replace(case, x=np.concatenate([case.x, others]))
    v = shrink(longer, modules=(0,), num_rows=8, implementation=implementation)
    assert_is_oracle(v, case, (0,))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_rows", [1, 32])
def test_the_largest_rank_is_served(implementation: str, block_rows: int) -> None:
    case = make_case(
        row_slots=np.array([1] * 5 + [2], np.int32),
        ranks={1: {3: 256}, 2: {3: 4}},
        in_size=200,
        out_size=OUT,
        page_elems=2048,
        block_rows=block_rows,
        dtype=jnp.bfloat16,
        seed=0,
    )
    v = shrink(case, modules=(3,), num_rows=256, implementation=implementation)
    assert_is_oracle(v, case, (3,))


@pytest.mark.parametrize(
    ("block_rows", "config"),
    [
        (1, Config(num_shares=4, row_ranks=2, row_chunks=2, num_warps=2)),
        (1, Config(num_shares=3, row_ranks=4, row_chunks=64, num_warps=8)),
        (4, Config(num_shares=1, tile_ranks=16, tile_chunks=1, num_warps=4, num_stages=1)),
        (4, Config(num_shares=2, tile_ranks=32, tile_chunks=4, num_warps=4, num_stages=4)),
        (4, Config(num_shares=2, tile_ranks=16, tile_chunks=2, num_warps=4, num_parts=3)),
        (1, Config(num_shares=2, num_warps=4, num_parts=4)),  # single rows stay whole
    ],
)
def test_every_configuration_gives_the_same_answer(block_rows: int, config: Config) -> None:
    case = make_case(
        row_slots=np.array([1, 2, 1, 1, 0], np.int32),
        ranks={1: {0: 24}, 2: {0: 5}},
        in_size=328,
        out_size=OUT,
        page_elems=1024,
        block_rows=block_rows,
        dtype=np.float32,
        seed=1,
    )
    v = shrink(case, modules=(0,), num_rows=24, implementation="triton", config=config)
    assert_is_oracle(v, case, (0,))


def test_programs_take_several_tiles_where_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_blocks, "MIN_TILE_PROGRAMS", 1)
    case = make_case(
        row_slots=np.arange(1, 10, dtype=np.int32),
        ranks={slot: {0: slot} for slot in range(1, 10)},
        in_size=136,
        out_size=OUT,
        page_elems=1024,
        block_rows=4,
        dtype=np.float32,
        seed=2,
    )
    v = shrink(case, modules=(0,), num_rows=9, implementation="triton")
    assert_is_oracle(v, case, (0,))


@pytest.mark.parametrize("spare_tiles", [0, 1, 7])
def test_no_program_has_a_single_row_tile_that_has_no_row(spare_tiles: int) -> None:
    case = make_case(
        row_slots=np.array([1, 0, 1], np.int32),
        ranks={1: {0: 8}},
        in_size=128,
        out_size=OUT,
        page_elems=1024,
        block_rows=1,
        dtype=np.float32,
        seed=3,
        spare_tiles=spare_tiles,
    )
    assert triton_blocks.num_tile_programs(case.tiles, 1) == 3
    v = shrink(case, modules=(0,), num_rows=8, implementation="triton")
    assert_is_oracle(v, case, (0,))


def test_impossible_arguments_are_refused() -> None:
    case = make_case(
        row_slots=np.array([1], np.int32),
        ranks={1: {0: 8}},
        in_size=128,
        out_size=OUT,
        page_elems=1024,
        block_rows=1,
        dtype=np.float32,
        seed=0,
    )
    with pytest.raises(ValueError, match="'cuda' is not one that this op has"):
        shrink(case, modules=(0,), num_rows=8, implementation="cuda")
    short = LoraCase(**{**vars(case), "x": np.zeros((0, 128), np.float32)})
    with pytest.raises(ValueError, match="tiles order 1 rows"):
        shrink(short, modules=(0,), num_rows=8, implementation="xla")
    odd = LoraCase(**{**vars(case), "pool": np.zeros((2, 1000), np.float32)})
    for implementation in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match="page_elems 1000 is not a multiple of 128"):
            shrink(odd, modules=(0,), num_rows=8, implementation=implementation)
