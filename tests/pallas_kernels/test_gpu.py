"""Gate (c): the compiled kernels on a GPU against the float64 oracles, at real shapes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention_triton
from pallas_kernels.add_norm import add_rms_norm
from pallas_kernels.lora_expand import lora_expand
from pallas_kernels.lora_rows import lora_rows
from pallas_kernels.lora_rows_triton import Config
from pallas_kernels.lora_shrink import lora_shrink
from pallas_kernels.lora_shrink_triton import Config as ShrinkConfig
from pallas_kernels.paged_attention import paged_decode_attention, paged_ragged_attention
from pallas_kernels.rope_write import HeadShape, rope_write
from pallas_kernels.shapes import MODELS, RANKS, row_slots
from tests.pallas_kernels.attention_case import make_contexts, make_query_tiles
from tests.pallas_kernels.lora_case import LoraCase, make_case
from tests.pallas_kernels.rope_case import make_rope_case, rope_oracle
from tests.pallas_kernels.tolerances import assert_close, tensor_core_accumulation

pytestmark = [
    pytest.mark.gpu,
    # JAX 0.11 says at lowering that Pallas-Triton will go one day
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]
QKV, OUT, GATE_UP, DOWN = (0, 1, 2), (3,), (4, 5), (6,)
BATCHES = [  # model, modules, rows, block_rows, popularity
    ("llama-7b", QKV, 64, 1, "distinct"),
    ("llama-7b", QKV, 1, 1, "distinct"),
    ("llama-7b", OUT, 64, 1, "zipf"),
    ("llama-7b", GATE_UP, 16, 1, "uniform"),
    ("llama-7b", DOWN, 16, 1, "identical"),
    ("llama-7b", QKV, 200, 64, "zipf"),
    ("llama-7b", GATE_UP, 70, 16, "uniform"),
    ("llama-7b", DOWN, 200, 64, "identical"),
    ("llama-3.1-8b", QKV, 64, 1, "uniform"),
    ("llama-3.1-8b", DOWN, 8, 1, "distinct"),
    ("llama-3.1-8b", DOWN, 100, 64, "zipf"),
    ("qwen2-0.5b", QKV, 32, 1, "zipf"),
    ("qwen2-0.5b", DOWN, 32, 1, "uniform"),
    ("qwen2-0.5b", GATE_UP, 100, 64, "uniform"),
    ("demo", QKV, 16, 1, "distinct"),
    ("demo", GATE_UP, 64, 16, "base-only"),
]


def real_case(
    model: str, modules: tuple[int, ...], num_rows: int, block_rows: int, popularity: str
) -> tuple[LoraCase, dict[int, int]]:
    """A batch of one mix of ranks, each other adapter without one of the modules."""
    shape = MODELS[model]
    slots = row_slots(popularity, num_rows, 9, seed=1)
    ranks = (*RANKS, 12, 24, 4)
    held = {
        slot: {
            module: ranks[slot % len(ranks)]
            for i, module in enumerate(modules)
            if slot % 2 or i or len(modules) == 1
        }
        for slot in range(1, 10)
    }
    out_sizes = {module: shape.module_sizes(module)[1] for module in modules}
    case = make_case(
        row_slots=slots,
        ranks=held,
        in_size=shape.module_sizes(modules[0])[0],
        out_size=out_sizes,
        page_elems=shape.page_elems,
        block_rows=block_rows,
        dtype=jnp.bfloat16,
        seed=2,
    )
    return case, out_sizes


@pytest.mark.parametrize(
    ("implementation", "batch"),
    [
        (implementation, batch)
        for implementation in ("triton", "mosaic")
        for batch in BATCHES
        if implementation == "triton" or batch[0] != "demo"  # its widths are not whole chunks
    ],
    ids=str,
)
def test_lora_kernels_agree_with_the_oracle(implementation: str, batch: Any) -> None:
    case, out_sizes = real_case(*batch)
    modules, sizes = tuple(out_sizes), tuple(out_sizes.values())

    @jax.jit
    def run(x: Any, base: Any, v: Any, *adapters: Any) -> Any:
        shrunk = lora_shrink(
            *(x, *adapters),
            modules=modules,
            num_rows=64,
            rank_split=1,
            implementation=implementation,
        )
        expanded = lora_expand(
            *(base, v, *adapters, jnp.int32(0)),
            modules=modules,
            out_sizes=sizes,
            implementation=implementation,
        )
        return shrunk, expanded

    rng = np.random.default_rng(0)
    num_tokens = len(case.row_slots)
    base = rng.normal(size=(num_tokens, sum(sizes))).astype(jnp.bfloat16)
    v = rng.normal(size=(num_tokens, len(modules), 64)).astype(np.float32)
    adapters = (case.pool, case.slot_pages, np.int32(case.layer), case.tiles)
    shrunk, expanded = (np.asarray(array) for array in run(case.x, base, v, *adapters))

    for (row, place), want in case.shrunk(modules).items():
        accumulation = tensor_core_accumulation(case.x.shape[1])
        assert_close(shrunk[row, place, : len(want)], want, accumulation=accumulation)
    assert_close(expanded, case.expanded(base, v, modules, sizes, 0))
    untouched = case.row_slots == 0
    assert base[untouched].tobytes() == expanded[untouched].tobytes()

    if case.tiles.block_rows == 1:
        apart = np.asarray(run(case.x, None, v, *adapters)[1])
        assert_close(apart, case.expanded(np.zeros(base.shape), v, modules, sizes, 0))
        assert not apart[untouched].any()


@pytest.mark.parametrize("batch", [batch for batch in BATCHES if batch[3] > 1], ids=str)
def test_parts_of_the_input_add_up_to_the_oracle(batch: Any) -> None:
    case, out_sizes = real_case(*batch)
    modules = tuple(out_sizes)
    config = ShrinkConfig(
        num_shares=4, num_warps=4, num_stages=3, row_ranks=2, tile_ranks=16, num_parts=4
    )
    run = functools.partial(
        lora_shrink, modules=modules, num_rows=64, rank_split=1, implementation="triton",
        config=config,
    )  # fmt: skip
    adapters = (case.pool, case.slot_pages, np.int32(case.layer), case.tiles)
    v = np.asarray(jax.jit(run)(case.x, *adapters))
    for (row, place), want in case.shrunk(modules).items():
        accumulation = tensor_core_accumulation(case.x.shape[1])
        assert_close(v[row, place, : len(want)], want, accumulation=accumulation)


@pytest.mark.parametrize("batch", [batch for batch in BATCHES if batch[3] == 1], ids=str)
@pytest.mark.parametrize(("block_chunks", "row_ranks"), [(8, 8), (32, 4)])
def test_the_kernel_of_single_rows_agrees_with_the_oracle_and_with_two(
    batch: Any, block_chunks: int, row_ranks: int
) -> None:
    case, out_sizes = real_case(*batch)
    modules, sizes = tuple(out_sizes), tuple(out_sizes.values())
    config = Config(block_chunks=block_chunks, row_ranks=row_ranks, num_warps=8)

    @jax.jit
    def run(x: Any, *adapters: Any) -> Any:
        more: dict[str, Any] = {"modules": modules, "out_sizes": sizes, "implementation": "triton"}
        v = lora_shrink(
            *(x, *adapters), modules=modules, num_rows=64, rank_split=1, implementation="triton"
        )
        one = lora_rows(*(x, *adapters), max_rank=64, config=config, **more)
        return one, lora_expand(*(None, v, *adapters, jnp.int32(0)), **more)

    adapters = (case.pool, case.slot_pages, np.int32(case.layer), case.tiles)
    one, two = (np.asarray(array) for array in run(case.x, *adapters))
    want = case.deltas(modules, sizes, 64)
    assert_close(one, want)
    assert_close(two, want)
    assert not one[case.row_slots == 0].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 32, 128), (32, 8, 128), (28, 4, 128), (14, 2, 64), (4, 2, 32), (4, 2, 80), (4, 4, 96)],
)
def test_attention_kernels_agree_with_the_oracle(
    heads: int, kv_heads: int, head_dim: int, dtype: Any
) -> None:
    lengths = [512, 1, 700, 16, 333]
    contexts = make_contexts(
        lengths=lengths,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=16,
        dtype=dtype,
        seed=3,
        pages_per_row=128,
    )
    tiles, tokens = make_query_tiles([(4, 300, 33), (1, 0, 1), (3, 0, 16)], block_q=32, capacity=9)
    keywords: dict[str, Any] = {
        "num_kv_heads": kv_heads,
        "page_size": 16,
        "scale": head_dim**-0.5,
        "implementation": "triton",
    }
    whole_rows = decode_attention_triton.Config(
        extra_parts=0, min_part=256, heads_first=True, edges_apart=False, block_kv=32,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    q = (3 * rng.normal(size=(len(tokens) + 2, heads, head_dim))).astype(dtype)
    rows = np.array([2, 0, 1, 3, 4, 0], np.int32)
    seen = np.array([700, 512, 1, 9, 333, 0], np.int32)

    @jax.jit
    def run(q: Any, pool: Any, page_table: Any, rows: Any, seen: Any, tiles: Any, w: Any) -> Any:
        arrays = (pool, page_table, rows, seen, w)
        cut = paged_decode_attention(q, *arrays, **keywords)
        whole = paged_decode_attention(q[:6], *arrays, config=whole_rows, **keywords)
        prefilled = paged_ragged_attention(q, pool, page_table, tiles, w, **keywords)
        return cut, whole, prefilled

    for window in (2**31 - 1, 100):
        arrays = (q, contexts.pool, contexts.page_table, rows, seen, tiles, np.int32(window))
        cut, whole, prefilled = (np.asarray(array) for array in run(*arrays))
        for token in range(5):
            want = contexts.attention(
                q[token], int(rows[token]), int(seen[token]) - 1, window, head_dim**-0.5
            )
            assert_close(cut[token], want, inner=dtype)
            assert_close(whole[token], want, inner=dtype)
        assert not cut[5].any() and not whole[5].any()
        for t, token_at in enumerate(tokens):
            assert token_at is not None
            want = contexts.attention(q[t], *token_at, window, head_dim**-0.5)
            assert_close(prefilled[t], want, inner=dtype)
        assert not prefilled[len(tokens) :].any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 32, 128), (32, 8, 128), (28, 4, 128), (14, 2, 64)]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("window", [2**31 - 1, 100])
def test_mosaic_attention_agrees_with_the_oracle(
    heads: int, kv_heads: int, head_dim: int, dtype: Any, window: int
) -> None:
    contexts = make_contexts(
        lengths=[512, 1, 700, 16, 333],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=16,
        dtype=dtype,
        seed=3,
        pages_per_row=128,
    )
    spans = [(4, 300, 33), (1, 0, 1), (3, 0, 16), (2, 500, 200), (0, 0, 512)]
    tiles, tokens = make_query_tiles(spans, block_q=128, capacity=11)
    rng = np.random.default_rng(0)
    q = (3 * rng.normal(size=(len(tokens) + 2, heads, head_dim))).astype(dtype)
    base = rng.normal(size=q.shape).astype(dtype)

    @jax.jit
    def run(*arrays: Any) -> Any:
        return paged_ragged_attention(
            *arrays,
            num_kv_heads=kv_heads,
            page_size=16,
            scale=head_dim**-0.5,
            implementation="mosaic",
        )

    out = np.asarray(
        run(q, contexts.pool, contexts.page_table, tiles, np.int32(window), jnp.asarray(base))
    )
    for t in [*range(0, len(tokens), 5), len(tokens) - 1]:
        token_at = tokens[t]
        assert token_at is not None
        want = contexts.attention(q[t], *token_at, window, head_dim**-0.5)
        assert_close(out[t], want, inner=dtype)
    assert out[len(tokens) :].tobytes() == base[len(tokens) :].tobytes()


@pytest.mark.parametrize("model", ["llama-7b", "llama-3.1-8b", "qwen2-0.5b", "demo"])
@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("has_lora", [False, True])
def test_heads_turn_and_land_in_their_places(
    model: str, implementation: str, has_norms: bool, has_lora: bool
) -> None:
    sizes = MODELS[model]
    shape = HeadShape(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        page_size=sizes.page_size,
    )
    case = make_rope_case(
        shape, num_tokens=32, has_norms=has_norms, dtype=jnp.bfloat16, seed=3, has_lora=has_lora
    )
    run = jax.jit(
        lambda *arrays: rope_write(*arrays, shape=shape, eps=1e-5, implementation=implementation)
    )
    q, pool = run(*case)
    want_q, want_pool = rope_oracle(case, shape, 1e-5)
    real = case.pages != 0
    inner = jnp.bfloat16 if has_norms else np.float32  # normed heads are rounded, then turned
    assert_close(np.asarray(q)[real], want_q[real], inner=inner)
    assert_close(np.asarray(pool)[1:], want_pool[1:], inner=inner)


@pytest.mark.parametrize("width", [896, 4096, 8192])
@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_sum_and_norm(width: int, implementation: str) -> None:
    rng = np.random.default_rng(0)
    x, delta = rng.normal(size=(2, 64, width)).astype(jnp.bfloat16)
    weight = rng.uniform(0.5, 1.5, width).astype(jnp.bfloat16)
    lora = rng.normal(size=x.shape).astype(np.float32)
    run = jax.jit(
        lambda x, delta, lora: add_rms_norm(
            x, delta, weight, 1e-5, lora, implementation=implementation
        )
    )
    for added in (None, lora):
        total, normed = run(x, delta, added)
        want = x.astype(np.float64) + delta.astype(np.float64)
        if added is not None:
            want = (delta.astype(np.float64) + added).astype(jnp.bfloat16).astype(np.float64) + x
        assert_close(total, want)
        rounded = np.asarray(total).astype(np.float64)  # what is normed
        scale = 1 / np.sqrt((rounded**2).mean(axis=1, keepdims=True) + 1e-5)
        assert_close(normed, rounded * scale * weight.astype(np.float64), inner=jnp.bfloat16)
