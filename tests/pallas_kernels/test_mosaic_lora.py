"""Mosaic GPU LoRA kernels against the float64 oracle: gate (a), in the interpreter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lora_expand_mosaic, lora_shrink_mosaic
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_shrink import lora_shrink
from tests.pallas_kernels.lora_case import LoraCase, make_case
from tests.pallas_kernels.tolerances import assert_close

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Mosaic GPU interpreter is public from JAX 0.11 on"
)
MODULES = (0, 1, 2)
RANKS = {1: {0: 8, 1: 4}, 2: {0: 12, 1: 3, 2: 5}}  # slot 1 lacks the last module
OUT = {0: 384, 1: 128, 2: 128}
PAGE_CHUNKS = (8, 2)  # rows of three chunks straddle pages here and there, or everywhere


def make(page_chunks: int, rank_split: int = 1) -> LoraCase:
    return make_case(
        row_slots=np.array([1, 0, 2, 2, 2, 2, 2, 2]), ranks=RANKS, in_size=384, out_size=OUT,
        page_elems=page_chunks * 128, block_rows=8, dtype=jnp.bfloat16,
        seed=page_chunks, spare_tiles=1, rank_split=rank_split,
    )  # fmt: skip


def arrays(case: LoraCase) -> tuple[Any, ...]:
    adapters = (case.pool, case.slot_pages, np.int32(case.layer), case.tiles)
    return tuple(jax.tree.map(jnp.asarray, adapters))


@needs_interpreter
@pytest.mark.parametrize(("page_chunks", "rank_split"), [(8, 1), (2, 1), (8, 2)])
def test_every_row_is_projected_by_its_own_adapter(page_chunks: int, rank_split: int) -> None:
    case = make(page_chunks, rank_split)
    config = lora_shrink_mosaic.Config(block_ranks=8, block_chunks=2, ring_bytes=2048)
    v = lora_shrink(
        jnp.asarray(case.x), *arrays(case), modules=MODULES, num_rows=13,
        rank_split=rank_split, implementation="mosaic", config=config, interpret=True,
    )  # fmt: skip
    shrunk = np.asarray(v)
    answers = case.shrunk(MODULES)
    assert answers
    for (row, place), want in answers.items():
        assert_close(shrunk[row, place, : len(want)], want)


@needs_interpreter
@pytest.mark.parametrize("page_chunks", PAGE_CHUNKS)
def test_every_row_gets_its_own_change_and_base_rows_none(page_chunks: int) -> None:
    case = make(page_chunks)
    rng = np.random.default_rng(1)
    sizes = tuple(OUT[module] for module in MODULES)
    base = rng.normal(size=(8, sum(sizes) + 128)).astype(jnp.bfloat16)
    v = rng.normal(size=(8, 3, 16)).astype(np.float32)
    y = lora_expand(
        jnp.asarray(base), jnp.asarray(v), *arrays(case), jnp.int32(128), modules=MODULES,
        out_sizes=sizes, implementation="mosaic", interpret=True,
        config=lora_expand_mosaic.Config(block_chunks=2, num_slots=4),
    )  # fmt: skip
    expanded = np.asarray(y)
    assert_close(expanded, case.expanded(base, v, MODULES, sizes, 128))
    assert expanded[1].tobytes() == base[1].tobytes()
    assert expanded[:, :128].tobytes() == base[:, :128].tobytes()


@needs_interpreter
def test_without_a_base_rows_get_the_product_alone() -> None:
    case = make_case(
        row_slots=np.array([1, 0, 2, 2]), ranks=RANKS, in_size=384, out_size=OUT,
        page_elems=1024, block_rows=1, dtype=jnp.bfloat16, seed=3,
    )  # fmt: skip
    sizes = tuple(OUT[module] for module in MODULES)
    v = np.random.default_rng(1).normal(size=(4, 3, 16)).astype(np.float32)
    y = lora_expand(
        None, jnp.asarray(v), *arrays(case), jnp.int32(0), modules=MODULES, out_sizes=sizes,
        implementation="mosaic", interpret=True,
        config=lora_expand_mosaic.Config(block_chunks=2, num_slots=4),
    )  # fmt: skip
    expanded = np.asarray(y)
    assert expanded.dtype == np.float32
    nothing = np.zeros((4, sum(sizes)), np.float32)
    assert_close(expanded, case.expanded(nothing, v, MODULES, sizes, 0))
    assert not expanded[1].any()


def test_a_width_of_partial_chunks_is_refused() -> None:
    case = make(8)
    keywords: dict[str, Any] = {"modules": (0,), "implementation": "mosaic"}
    with pytest.raises(ValueError, match="width: got 200, allowed: multiples of 128"):
        lora_shrink(jnp.zeros((8, 200)), *arrays(case), num_rows=16, rank_split=1, **keywords)
    base, v = jnp.zeros((8, 384)), jnp.zeros((8, 1, 16))
    with pytest.raises(ValueError, match="width: got 200, allowed: multiples of 128"):
        lora_expand(base, v, *arrays(case), jnp.int32(0), out_sizes=(200,), **keywords)
