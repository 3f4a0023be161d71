"""Paged attention against a float64 oracle: gate (a), on references and interpreted kernels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention_triton, ragged_attention_triton
from pallas_kernels.paged_attention import paged_decode_attention, paged_ragged_attention
from tests.pallas_kernels.attention_case import PagedContexts, make_contexts, make_query_tiles
from tests.pallas_kernels.tolerances import assert_close

IMPLEMENTATIONS = ["xla", "triton"]
NO_WINDOW = 2**31 - 1
# heads, kv heads, head_dim, page_size, dtype: MHA, GQA, groups of 7, odd head_dims, pages of 1
GEOMETRIES = [
    (4, 4, 128, 16, np.float32),
    (8, 2, 32, 16, np.float32),
    (14, 2, 64, 16, jnp.bfloat16),
    (4, 2, 80, 4, np.float32),
    (3, 1, 96, 1, np.float16),
]


@functools.cache
def compiled(op: Any, **keywords: Any) -> Any:
    """The op with these keywords; cases of one shape share its compilation."""
    interpret = keywords["implementation"] == "triton"
    return jax.jit(functools.partial(op, scale=0.125, interpret=interpret, **keywords))


def decode(
    contexts: PagedContexts, q: Any, rows: Any, lengths: Any, window: int, **keywords: Any
) -> np.ndarray:
    run = compiled(
        paged_decode_attention,
        num_kv_heads=contexts.keys[0].shape[1],
        page_size=contexts.page_size,
        **keywords,
    )
    index = (np.asarray(rows, np.int32), np.asarray(lengths, np.int32), np.int32(window))
    out = run(q, contexts.pool, contexts.page_table, *index)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    return np.asarray(out)


def ragged(
    contexts: PagedContexts, q: Any, tiles: Any, window: int, base: Any = None, **keywords: Any
) -> np.ndarray:
    run = compiled(
        paged_ragged_attention,
        num_kv_heads=contexts.keys[0].shape[1],
        page_size=contexts.page_size,
        **keywords,
    )
    out = run(q, contexts.pool, contexts.page_table, tiles, np.int32(window), base)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    return np.asarray(out)


def queries(num_tokens: int, num_heads: int, head_dim: int, dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(11)
    return (3 * rng.normal(size=(num_tokens, num_heads, head_dim))).astype(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size", "dtype"), GEOMETRIES)
@pytest.mark.parametrize("window", [NO_WINDOW, 5])
def test_a_decode_row_attends_to_its_visible_positions_only(
    implementation: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: Any,
    window: int,
) -> None:
    stored = [1, page_size, 70, 33]
    contexts = make_contexts(
        lengths=stored,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        seed=heads,
    )
    rows, lengths = [2, 0, 0, 3, 1], [70, 1, 0, 20, page_size]
    q = queries(len(rows), heads, head_dim, dtype)
    out = decode(contexts, q, rows, lengths, window, implementation=implementation)
    for token, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if length == 0:
            assert not out[token].any()
        else:
            want = contexts.attention(q[token], row, length - 1, window, 0.125)
            assert_close(out[token], want, inner=dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_split_of_a_long_context_does_not_show(implementation: str) -> None:
    contexts = make_contexts(
        lengths=[700, 3, 129],
        num_kv_heads=2,
        head_dim=32,
        page_size=16,
        dtype=np.float32,
        seed=1,
        pages_per_row=50,
    )
    q = queries(4, 4, 32, np.float32)
    rows, lengths = [0, 1, 2, 0], [700, 3, 129, 0]
    keywords: dict[str, Any] = {"implementation": implementation}
    for window in (NO_WINDOW, 100):
        for extra_parts in (0, 2, 40) if implementation == "triton" else (0,):
            if implementation == "triton":
                keywords["config"] = decode_attention_triton.Config(
                    extra_parts=extra_parts,
                    min_part=32,
                    heads_first=extra_parts == 2,
                    edges_apart=extra_parts != 2,
                    block_kv=32,
                    num_warps=4,
                    num_stages=2,
                )
            out = decode(contexts, q, rows, lengths, window, **keywords)
            for token in range(3):
                want = contexts.attention(q[token], rows[token], lengths[token] - 1, window, 0.125)
                assert_close(out[token], want)
            assert not out[3].any()


@pytest.mark.parametrize("window", [NO_WINDOW, 500])
@pytest.mark.parametrize(("extra_parts", "min_part"), [(1, 32), (7, 64), (40, 32), (200, 32)])
def test_parts_cover_what_each_row_sees_exactly_once(
    extra_parts: int, min_part: int, window: int
) -> None:
    lengths = np.random.default_rng(0).integers(0, 2000, size=20).astype(np.int32)
    lengths[[3, 7]] = 0, 1
    rows = np.arange(20, dtype=np.int32)[::-1]
    config = decode_attention_triton.Config(
        extra_parts=extra_parts, min_part=min_part, heads_first=False, edges_apart=True,
        block_kv=32, num_warps=4, num_stages=2,
    )  # fmt: skip
    cut = decode_attention_triton.cut_contexts(
        jnp.asarray(rows), jnp.asarray(lengths), jnp.int32(window), config
    )
    parts = decode_attention_triton.Parts(*map(np.asarray, cut))
    seen: dict[int, list[int]] = {token: [] for token in range(20)}
    for part in range(20 + extra_parts):
        token = int(parts.token[part])
        if token < 20:
            assert parts.row[part] == rows[token]
            seen[token] += range(parts.begin[part], parts.end[part])
    for token, length in enumerate(lengths):
        assert seen[token] == list(range(max(0, length - window), length))
        number = np.flatnonzero(parts.token == token)
        assert (parts.siblings[number] == len(number)).all() and len(number) >= 1
        place = np.flatnonzero(parts.cut_token == token)
        if len(number) > 1:
            assert (parts.first_of[place], parts.count_of[place]) == (number[0], len(number))
            longest = max(parts.end[number] - parts.begin[number])
            assert longest >= min_part and longest <= max(
                min_part, lengths.sum() / extra_parts + 64
            )
        else:
            assert len(place) == 0


@pytest.mark.parametrize("extra_parts", [0, 9])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_may_be_the_first_tokens_of_a_longer_step(
    implementation: str, extra_parts: int
) -> None:
    num_rows = decode_attention_triton.MIXED_PROGRAMS + 5
    contexts = make_contexts(
        lengths=[90, 17], num_kv_heads=2, head_dim=32, page_size=16, dtype=np.float32, seed=1
    )
    q = queries(num_rows + 3, 4, 32, np.float32)
    rows = np.arange(num_rows) % 2
    lengths = np.where(np.arange(num_rows) % 9 == 4, 0, np.array([90, 17])[rows])
    keywords: dict[str, Any] = {"implementation": implementation}
    if implementation == "triton":
        keywords["config"] = decode_attention_triton.Config(
            extra_parts=extra_parts, min_part=32, heads_first=False, edges_apart=True,
            block_kv=32, num_warps=4, num_stages=2,
        )  # fmt: skip
    out = decode(contexts, q, rows, lengths, NO_WINDOW, **keywords)
    for token, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if length == 0:
            assert not out[token].any()
        else:
            want = contexts.attention(q[token], int(row), int(length) - 1, NO_WINDOW, 0.125)
            assert_close(out[token], want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size", "dtype"), GEOMETRIES)
@pytest.mark.parametrize(("window", "block_q"), [(NO_WINDOW, 16), (7, 8)])
def test_a_prefill_token_attends_causally_by_absolute_position(
    implementation: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: Any,
    window: int,
    block_q: int,
) -> None:
    spans = [(2, 50, 19), (0, 0, 1), (1, 0, 12)]  # a chunk behind a prefix, and whole prompts
    contexts = make_contexts(
        lengths=[1, 12, 69],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        seed=heads,
    )
    tiles, tokens = make_query_tiles(spans, block_q=block_q, capacity=8)
    tokens += [None] * 3
    q = queries(len(tokens), heads, head_dim, dtype)
    q[-3:] = np.nan
    out = ragged(contexts, q, tiles, window, implementation=implementation)
    for t, token in enumerate(tokens):
        if token is None:
            assert not out[t].any()
        else:
            row, position = token
            want = contexts.attention(q[t], row, position, window, 0.125)
            assert_close(out[t], want, inner=dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_scores_that_are_not_finite_show_in_their_token_and_in_no_other(
    implementation: str, bad: float
) -> None:
    contexts = make_contexts(
        lengths=[40, 20], num_kv_heads=2, head_dim=32, page_size=16, dtype=np.float32, seed=2
    )
    q = queries(2, 4, 32, np.float32)
    q[0] = bad
    tiles, _ = make_query_tiles([(0, 39, 1), (1, 19, 1)], block_q=8, capacity=3)
    for out in (
        decode(contexts, q, [0, 1], [40, 20], NO_WINDOW, implementation=implementation),
        ragged(contexts, q, tiles, NO_WINDOW, implementation=implementation),
    ):
        assert np.isnan(out[0]).any(axis=-1).all()
        assert_close(out[1], contexts.attention(q[1], 1, 19, NO_WINDOW, 0.125))


@pytest.mark.parametrize(
    ("block_heads", "units_together", "block_kv", "window"),
    [(1, 4, 16, NO_WINDOW), (2, 1, 32, 50), (4, 8, 16, 50), (4, 1, 32, 3), (1, 1, 8, 20)],
)
def test_how_the_work_is_divided_does_not_show(
    block_heads: int, units_together: int, block_kv: int, window: int
) -> None:
    contexts = make_contexts(
        lengths=[150, 12], num_kv_heads=2, head_dim=32, page_size=16, dtype=np.float32, seed=2
    )
    tiles, tokens = make_query_tiles([(0, 110, 40), (1, 0, 12)], block_q=16, capacity=6)
    q = queries(len(tokens), 6, 32, np.float32)
    config = ragged_attention_triton.Config(
        block_heads=block_heads,
        units_together=units_together,
        block_kv=block_kv,
        num_warps=4,
        num_stages=2,
    )
    out = ragged(contexts, q, tiles, window, implementation="triton", config=config)
    for t, token in enumerate(tokens):
        assert token is not None
        assert_close(out[t], contexts.attention(q[t], *token, window, 0.125))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_in_no_tile_keep_what_the_base_holds(implementation: str) -> None:
    contexts = make_contexts(
        lengths=[40], num_kv_heads=2, head_dim=32, page_size=16, dtype=np.float32, seed=2
    )
    tiles, _ = make_query_tiles([(0, 30, 10)], block_q=8, capacity=3)
    tiles = dataclasses.replace(tiles, q_start=tiles.q_start + 2)
    q, base = queries(14, 4, 32, np.float32), queries(14, 4, 32, np.float32) + 1
    out = ragged(contexts, q, tiles, NO_WINDOW, base, implementation=implementation)
    for t in range(14):
        if 2 <= t < 12:
            assert_close(out[t], contexts.attention(q[t], 0, 28 + t, NO_WINDOW, 0.125))
        else:
            np.testing.assert_array_equal(out[t], base[t])
    with pytest.raises(ValueError, match="base is float16"):
        ragged(contexts, q, tiles, 9, base.astype(np.float16), implementation=implementation)


def test_impossible_arguments_are_refused() -> None:
    contexts = make_contexts(
        lengths=[4], num_kv_heads=2, head_dim=32, page_size=4, dtype=np.float32, seed=2
    )
    with pytest.raises(ValueError, match="a multiple of 2 heads"):
        decode(contexts, queries(1, 3, 32, np.float32), [0], [4], 9, implementation="xla")
    with pytest.raises(ValueError, match="not \\[num_pages, 1024\\]"):
        decode(contexts, queries(1, 4, 64, np.float32), [0], [4], 9, implementation="xla")
    with pytest.raises(ValueError, match="'cuda' is not one"):
        decode(contexts, queries(1, 4, 32, np.float32), [0], [4], 9, implementation="cuda")
