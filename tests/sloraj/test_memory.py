"""The memory plan: the pool takes what is left, or what it was given, or says why it cannot."""

from __future__ import annotations

import pytest

from sloraj.config import PoolLayout
from sloraj.errors import ConfigError
from sloraj.runner.memory import GIB, plan_memory

LAYOUT = PoolLayout(
    num_layers=32, num_kv_heads=32, head_dim=128, page_size=16, tp=1, dtype="bfloat16"
)
PAGE_BYTES = 32 * 2 * 16 * 32 * 128 * 2  # layers, key and value, tokens, heads, head_dim, bytes


def test_the_pool_takes_what_weights_and_workspace_leave() -> None:
    plan = plan_memory(
        LAYOUT, limit_bytes=80 * GIB, in_use_bytes=13 * GIB, workspace_bytes=2 * GIB,
        pool_bytes=None, min_pages=100,
    )  # fmt: skip
    assert plan.page_bytes == PAGE_BYTES
    assert plan.num_pages == 65 * GIB // PAGE_BYTES
    assert plan.pool_bytes == plan.num_pages * PAGE_BYTES


def test_a_given_pool_is_not_exceeded() -> None:
    plan = plan_memory(
        LAYOUT, limit_bytes=80 * GIB, in_use_bytes=0, workspace_bytes=0, pool_bytes=24 * 10**9,
        min_pages=1,
    )  # fmt: skip
    assert 24 * 10**9 - PAGE_BYTES < plan.pool_bytes <= 24 * 10**9


def test_a_pool_too_small_for_one_sequence_and_one_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="pool_bytes: got") as caught:
        plan_memory(
            LAYOUT, limit_bytes=None, in_use_bytes=0, workspace_bytes=0,
            pool_bytes=99 * PAGE_BYTES, min_pages=100,
        )  # fmt: skip
    assert str(100 * PAGE_BYTES) in str(caught.value)
