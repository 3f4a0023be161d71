"""Settings: what is refused, and what "auto" becomes."""

from __future__ import annotations

import pytest

from sloraj.config import EngineConfig, PoolLayout, resolve
from sloraj.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensor_parallel_size", 0),
        ("page_size", -1),
        ("max_num_seqs", 0),
        ("max_model_len", 0),
        ("max_rank", 257),
        ("max_rank", 0),
        ("kernels", "cuda"),
        ("dtype", "int8"),
        ("quantization", "int4"),
        ("loader_processes", -1),
        ("loader_processes", 65),
        ("queue_order", "lifo"),
        ("priority_ageing_s", 0.0),
        ("priority_ageing_s", float("nan")),
        ("tenant_weights", (("a", -1.0),)),
        ("tenant_weights", (("", 1.0),)),
        ("tenant_weights", {"a": 1.0}),
        ("tenant_weights", (("a", "much"),)),
        ("tenant_weights", (("x" * 257, 1.0),)),
        ("prompt_token_cost", 0.0),
        ("output_token_cost", float("inf")),
        ("adapter_cost", -0.5),
        ("adapter_load_cost", float("nan")),
        ("cluster_adapters", 0),
        ("tenant_max_waiting", 0),
        ("tenant_tolerance", -1.0),
        ("tenant_headroom", 1.0),
        ("tenant_max_waiting", 5),  # nothing would heed it
        ("tenant_weights", (("a", 2.0),)),  # nor that
        ("cluster_max_overtakes", 0),
        ("cluster_max_wait_s", 0.0),
        ("cluster_max_lead", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        EngineConfig(model="m", **{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_a_budget_that_decoding_alone_would_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        EngineConfig(model="m", max_num_seqs=64, max_num_batched_tokens=64)


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_auto_depends_on_the_platform_and_leaves_room_for_prefill(
    platform: str, dtype: str
) -> None:
    resolved = resolve(EngineConfig(model="m"), platform)
    assert resolved.dtype == dtype
    assert resolved.max_num_seqs is not None and resolved.max_num_batched_tokens is not None
    assert resolved.max_num_batched_tokens > resolved.max_num_seqs
    many = resolve(EngineConfig(model="m", max_num_seqs=5000), platform)
    assert many.max_num_batched_tokens is not None and many.max_num_batched_tokens > 5000


def test_what_is_given_is_kept() -> None:
    given = EngineConfig(
        model="m", max_num_seqs=3, max_num_batched_tokens=7, dtype="float16", loader_processes=1
    )
    assert resolve(given, "gpu") == given


def test_a_page_that_is_not_whole_chunks_is_refused() -> None:
    with pytest.raises(ConfigError, match="page_size"):
        PoolLayout(num_layers=1, num_kv_heads=1, head_dim=24, page_size=2, tp=1, dtype="float32")
