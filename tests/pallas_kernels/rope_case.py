"""Cases of rope_write and their answer by plain loops in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.rope_write import HeadNorms, HeadShape


class RopeCase(NamedTuple):
    """Arguments of `rope_write`, on the host."""

    qkv: np.ndarray
    pool: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    pages: np.ndarray
    offsets: np.ndarray
    norms: HeadNorms | None
    lora: np.ndarray | None = None


def make_rope_case(
    shape: HeadShape,
    *,
    num_tokens: int,
    has_norms: bool,
    dtype: Any,
    seed: int,
    has_lora: bool = False,
) -> RopeCase:
    """Tokens at places of their own, every third one padding; adapters add to all but the last."""
    rng = np.random.default_rng(seed)
    num_pages = num_tokens + 2
    page_elems = 2 * shape.num_kv_heads * shape.page_size * shape.head_dim
    angles = rng.uniform(0, 6, (num_tokens, shape.head_dim // 2)).astype(np.float32)
    pages = rng.permutation(np.arange(1, num_pages, dtype=np.int32))[:num_tokens]
    pages[2::3] = 0
    weights = rng.uniform(0.5, 1.5, (2, shape.head_dim)).astype(dtype)
    lora = rng.normal(size=(num_tokens - 1, shape.width)).astype(np.float32)
    return RopeCase(
        qkv=rng.normal(size=(num_tokens, shape.width)).astype(dtype),
        pool=rng.normal(size=(num_pages, page_elems)).astype(dtype),
        cos=np.cos(angles),
        sin=np.sin(angles),
        pages=pages,
        offsets=rng.integers(0, shape.page_size, num_tokens, dtype=np.int32),
        norms=HeadNorms(*weights) if has_norms else None,  # type: ignore[arg-type]
        lora=lora if has_lora else None,
    )


def rope_oracle(case: RopeCase, shape: HeadShape, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """q `[T, N, H]` and the pool in float64; what rounding to storage does is not modelled."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    half = head_dim // 2
    pool = case.pool.astype(np.float64).reshape(-1, 2, kv_heads, shape.page_size, head_dim)
    q = np.zeros((len(case.qkv), heads, head_dim))

    def turned(x: np.ndarray, token: int, weight: Any) -> np.ndarray:
        if weight is not None:
            x = x / np.sqrt(np.mean(x * x) + eps) * np.asarray(weight, np.float64)
        out = np.empty(head_dim)
        for i in range(half):
            cos, sin = float(case.cos[token, i]), float(case.sin[token, i])
            out[i] = x[i] * cos - x[half + i] * sin
            out[half + i] = x[half + i] * cos + x[i] * sin
        return out

    qkv = case.qkv.astype(np.float64)
    if case.lora is not None:
        qkv[: len(case.lora)] += case.lora
        qkv = qkv.astype(case.qkv.dtype).astype(np.float64)  # rounded before norms
    for token, row in enumerate(qkv):
        parts = row.reshape(heads + 2 * kv_heads, head_dim)
        for head in range(heads):
            q[token, head] = turned(parts[head], token, case.norms and case.norms.q)
        page, offset = case.pages[token], case.offsets[token]
        for head in range(kv_heads):
            key = turned(parts[heads + head], token, case.norms and case.norms.k)
            pool[page, 0, head, offset] = key
            pool[page, 1, head, offset] = parts[heads + kv_heads + head]
    return q, pool.reshape(len(pool), -1)
