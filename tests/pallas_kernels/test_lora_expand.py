"""lora_expand against a float64 oracle: gate (a), on the reference and the interpreted kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_blocks
from pallas_kernels.add_norm import add_lora
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_expand_triton import Config
from pallas_kernels.shapes import POPULARITIES, row_slots
from tests.pallas_kernels.lora_case import MIXED, LoraCase, compiled, make_case
from tests.pallas_kernels.tolerances import assert_close

IMPLEMENTATIONS = ["xla", "triton", "bmm"]


def expand(
    case: LoraCase,
    *,
    out_sizes: dict[int, int],
    num_ranks: int,
    column_offset: int = 0,
    spare_columns: int = 0,
    **keywords: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(base, what came out, the oracle's answer)."""
    rng = np.random.default_rng(7)
    modules, sizes = tuple(out_sizes), tuple(out_sizes.values())
    num_tokens = len(case.row_slots)
    base = rng.normal(size=(num_tokens, sum(sizes) + column_offset + spare_columns))
    base = base.astype(case.pool.dtype)
    base[:, 0] = -0.0  # a row that is only copied keeps even this
    v = np.full((num_tokens, len(modules), num_ranks), np.nan, np.float32)
    for row, slot in enumerate(case.row_slots):
        for place, module in enumerate(modules):
            rank = case.ranks.get(int(slot), {}).get(module, 0)
            v[row, place, :rank] = rng.normal(size=rank)

    run = compiled(lora_expand, modules=modules, out_sizes=sizes, **keywords)
    adapters = (case.pool, case.slot_pages, np.int32(case.layer), case.tiles)
    y = run(base, v, *adapters, np.int32(column_offset))
    assert y.dtype == base.dtype
    return base, np.asarray(y), case.expanded(base, v, modules, sizes, column_offset)


def assert_untouched_rows_are_equal_bit_for_bit(
    base: np.ndarray, y: np.ndarray, row_slots: np.ndarray
) -> None:
    untouched = row_slots == 0
    assert base[untouched].tobytes() == y[untouched].tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("block_rows", [1, 4])
def test_every_row_gets_the_delta_of_its_own_adapter(
    implementation: str, popularity: str, block_rows: int
) -> None:
    out_sizes = {0: 200, 1: 72, 2: 72}
    case = make_case(
        row_slots=row_slots(popularity, 9, len(MIXED), seed=3),
        ranks=MIXED,
        in_size=64,
        out_size=out_sizes,
        page_elems=1024,
        block_rows=block_rows,
        dtype=np.float32,
        seed=block_rows,
    )
    base, y, want = expand(case, out_sizes=out_sizes, num_ranks=64, implementation=implementation)
    assert_close(y, want)
    assert_untouched_rows_are_equal_bit_for_bit(base, y, case.row_slots)
    if popularity == "base-only":
        assert base.tobytes() == y.tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_without_a_base_every_row_gets_the_product_alone_and_base_rows_zeros(
    implementation: str, popularity: str
) -> None:
    out_sizes = {0: 200, 1: 72, 2: 72}
    case = make_case(
        row_slots=row_slots(popularity, 9, len(MIXED), seed=3),
        ranks=MIXED,
        in_size=64,
        out_size=out_sizes,
        page_elems=1024,
        block_rows=1,
        dtype=jnp.bfloat16,
        seed=4,
    )
    modules, sizes = tuple(out_sizes), tuple(out_sizes.values())
    rng = np.random.default_rng(5)
    v = rng.normal(size=(9, 3, 64)).astype(np.float32)
    base = rng.normal(size=(9, sum(sizes))).astype(jnp.bfloat16)
    adapters = (case.pool, case.slot_pages, np.int32(case.layer), case.tiles, np.int32(0))
    run = compiled(lora_expand, modules=modules, out_sizes=sizes, implementation=implementation)
    apart = np.asarray(run(None, v, *adapters))
    assert apart.dtype == np.float32
    nothing = np.zeros(base.shape, np.float32)
    read = (
        v.astype(jnp.bfloat16) if implementation == "bmm" else v
    )  # it rounds v to the pool's type
    assert_close(apart, case.expanded(nothing, read.astype(np.float32), modules, sizes, 0))
    assert not apart[case.row_slots == 0].any()
    in_place = np.asarray(run(base, v, *adapters))
    added = jax.jit(add_lora)(base, apart)  # elsewhere, and yet the same bits
    assert np.asarray(added).tobytes() == in_place.tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("out_size", "page_elems", "dtype"),
    [
        (128, 1024, np.float32),
        (896, 1024, jnp.bfloat16),
        (896, 4096, np.float16),
        (11008, 4096, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("block_rows", [1, 2, 16])
def test_rows_that_straddle_pages_are_read_from_their_own_pages(
    implementation: str, out_size: int, page_elems: int, dtype: Any, block_rows: int
) -> None:
    case = make_case(
        row_slots=np.array([1, 2, 0, 1], np.int32),
        ranks={1: {4: 3, 5: 8}, 2: {5: 9}},
        in_size=64,
        out_size={4: out_size, 5: out_size},
        page_elems=page_elems,
        block_rows=block_rows,
        dtype=dtype,
        seed=out_size,
    )
    base, y, want = expand(
        case,
        out_sizes={4: out_size, 5: out_size},
        num_ranks=9,
        implementation=implementation,
    )
    rounds_v = implementation == "bmm"  # to the operands' type
    assert_close(y, want, inner=dtype if rounds_v else np.float32)
    assert_untouched_rows_are_equal_bit_for_bit(base, y, case.row_slots)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_rows", [1, 2, 16])
def test_a_device_adds_to_its_own_columns_only(implementation: str, block_rows: int) -> None:
    case = make_case(
        row_slots=np.array([1, 2, 1], np.int32),
        ranks={1: {3: 24}, 2: {3: 4}},
        in_size=64,
        out_size={3: 136},
        page_elems=1024,
        block_rows=block_rows,
        dtype=np.float32,
        seed=5,
    )
    base, y, want = expand(
        case,
        out_sizes={3: 136},
        num_ranks=24,
        column_offset=136,
        spare_columns=60,
        implementation=implementation,
    )
    assert_close(y, want)
    assert base[:, :136].tobytes() == y[:, :136].tobytes()
    assert base[:, 272:].tobytes() == y[:, 272:].tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_rows", [1, 32])
def test_the_largest_rank_is_served(implementation: str, block_rows: int) -> None:
    case = make_case(
        row_slots=np.array([1] * 5 + [2], np.int32),
        ranks={1: {6: 256}, 2: {6: 4}},
        in_size=64,
        out_size={6: 200},
        page_elems=2048,
        block_rows=block_rows,
        dtype=np.float32,
        seed=0,
    )
    _, y, want = expand(case, out_sizes={6: 200}, num_ranks=256, implementation=implementation)
    assert_close(y, want)


@pytest.mark.parametrize(
    ("block_rows", "config"),
    [
        (1, Config(block_chunks=1, row_ranks=16, num_warps=2)),
        (1, Config(block_chunks=8, row_ranks=8, num_warps=8)),
        (4, Config(block_chunks=1, tile_ranks=16, tile_columns=128, num_warps=4)),
        (4, Config(block_chunks=4, tile_ranks=32, tile_columns=32, num_warps=4)),
    ],
)
def test_every_configuration_gives_the_same_answer(block_rows: int, config: Config) -> None:
    out_sizes = {0: 328, 1: 136}
    case = make_case(
        row_slots=np.array([1, 2, 1, 1, 0], np.int32),
        ranks={1: {0: 24, 1: 8}, 2: {0: 5}},
        in_size=64,
        out_size=out_sizes,
        page_elems=1024,
        block_rows=block_rows,
        dtype=np.float32,
        seed=1,
    )
    _, y, want = expand(
        case, out_sizes=out_sizes, num_ranks=24, implementation="triton", config=config
    )
    assert_close(y, want)


def test_programs_take_several_tiles_where_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_blocks, "MIN_TILE_PROGRAMS", 1)
    case = make_case(
        row_slots=np.arange(1, 10, dtype=np.int32),
        ranks={slot: {0: slot} for slot in range(1, 10)},
        in_size=64,
        out_size={0: 136},
        page_elems=1024,
        block_rows=4,
        dtype=np.float32,
        seed=2,
    )
    _, y, want = expand(case, out_sizes={0: 136}, num_ranks=9, implementation="triton")
    assert_close(y, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_devices_of_a_mesh_expand_their_own_pages(implementation: str) -> None:
    """Inside shard_map, an inner jit and with a traced layer, as the model calls it."""
    cases = [
        make_case(
            row_slots=np.array([1, 0, 2], np.int32),
            ranks={1: {0: 8}, 2: {0: 4}},
            in_size=64,
            out_size={0: 128},
            page_elems=1024,
            block_rows=2,
            dtype=np.float32,
            seed=0,
        )
        for _ in range(2)
    ]
    cases[1].pool[:] *= 2  # the same adapters, twice as large
    case = cases[0]
    adapters = jax.tree.map(jnp.asarray, (case.slot_pages, case.tiles))
    pool = np.concatenate([case.pool for case in cases], axis=1)
    base = np.zeros((3, 256), np.float32)
    v = np.ones((3, 1, 8), np.float32)
    mesh = jax.make_mesh(
        (2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    spec = jax.sharding.PartitionSpec

    @jax.jit
    def layer_body(base: Any, v: Any, pool: Any, layer: Any) -> Any:
        slot_pages, tiles = adapters
        return lora_expand(
            *(base, v, pool, slot_pages, layer, tiles, jnp.int32(0)),
            modules=(0,),
            out_sizes=(128,),
            implementation=implementation,
            interpret=implementation == "triton",
        )

    step = jax.shard_map(
        layer_body,
        mesh=mesh,
        in_specs=(spec(None, "tp"), spec(), spec(None, "tp"), spec()),
        out_specs=spec(None, "tp"),
        check_vma=False,
    )
    y = np.asarray(jax.jit(step)(base, v, pool, np.int32(case.layer)))
    want = case.expanded(base[:, :128], v, (0,), (128,), 0)
    assert_close(y[:, :128], want)
    assert_close(y[:, 128:], 2 * want)


def test_impossible_arguments_are_refused() -> None:
    case = make_case(
        row_slots=np.array([1], np.int32),
        ranks={1: {0: 8}},
        in_size=128,
        out_size={0: 128},
        page_elems=1024,
        block_rows=1,
        dtype=np.float32,
        seed=0,
    )
    with pytest.raises(ValueError, match="'' is not one that this op has"):
        expand(case, out_sizes={0: 128}, num_ranks=8, implementation="")
    several = dataclasses.replace(case.tiles, block_rows=2)
    with pytest.raises(ValueError, match="without base there is one for each of the 1 rows"):
        lora_expand(
            None,
            jnp.zeros((1, 1, 8)),
            *(case.pool, case.slot_pages, np.int32(0), several, np.int32(0)),
            modules=(0,),
            out_sizes=(128,),
            implementation="xla",
        )
    for shape, message in (((1, 100), "at least 128"), ((2, 128), "not \\[1,")):
        with pytest.raises(ValueError, match=message):
            lora_expand(
                jnp.zeros(shape),
                jnp.zeros((1, 1, 8)),
                *(case.pool, case.slot_pages, np.int32(0), case.tiles, np.int32(0)),
                modules=(0,),
                out_sizes=(128,),
                implementation="xla",
            )
