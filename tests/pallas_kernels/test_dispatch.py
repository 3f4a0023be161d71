"""The choice of an implementation, of a configuration, and the named shapes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch, tuning_table
from pallas_kernels.dispatch import (
    MOSAIC_BEST,
    MOSAIC_OPS,
    Implementation,
    KernelChoice,
    KernelShape,
    resolve_kernels,
)
from pallas_kernels.shapes import MODELS, POPULARITIES, row_slots

H200 = "NVIDIA H200"
SHAPE = KernelShape(head_dim=128, page_size=16, dtype="bfloat16", lora_widths=(4096, 11008))


@pytest.mark.parametrize(
    ("requested", "platform", "chosen"),
    [
        (None, "cpu", "xla"),
        ("xla", "gpu", "xla"),
        ("triton", "gpu", "triton"),
        ("triton", "cuda", "triton"),
    ],
)
def test_a_request_without_mosaic_is_served_by_one_implementation(
    requested: str | None, platform: str, chosen: Implementation
) -> None:
    choice = resolve_kernels(requested, platform=platform, device_kind=H200, shape=SHAPE)
    assert choice == KernelChoice.uniform(chosen)
    assert str(choice) == chosen


def test_mosaic_serves_the_ops_that_have_it_and_the_best_are_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_HAS_MOSAIC", True)
    asked = resolve_kernels("mosaic", platform="gpu", device_kind=H200, shape=SHAPE)
    best = resolve_kernels(None, platform="gpu", device_kind=H200, shape=SHAPE)
    for op in (field.name for field in dataclasses.fields(KernelChoice)):
        assert getattr(asked, op) == ("mosaic" if op in MOSAIC_OPS else "triton")
        assert getattr(best, op) == ("mosaic" if op in MOSAIC_BEST else "triton")
    assert MOSAIC_BEST <= MOSAIC_OPS


@pytest.mark.parametrize(
    ("op", "device_kind", "change", "reason"),
    [
        ("lora_expand", H200, {"lora_widths": (128, 344)}, r"widths \[344\], allowed: multiples"),
        (
            "rope_write",
            "NVIDIA A100-SXM4-80GB",
            {},
            "device 'NVIDIA A100-SXM4-80GB', allowed: H100",
        ),
        (
            "decode_attention",
            "NVIDIA H100 80GB HBM3",
            {"head_dim": 96},
            "head_dim 96, allowed: 64, 128",
        ),
        ("ragged_attention", H200, {"page_size": 24}, "page_size 24, allowed: 8, 16, 32"),
        ("ragged_attention", H200, {}, f"JAX {jax.__version__}, allowed: 0.11 and up"),
        ("ragged_attention", H200, {"dtype": "float32"}, "dtype float32, allowed: bfloat16"),
    ],
)
def test_what_mosaic_cannot_serve_is_refused_or_left_to_triton_aloud(
    op: str,
    device_kind: str,
    change: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dispatch, "_HAS_MOSAIC", "JAX" not in reason)
    monkeypatch.setattr(dispatch, "MOSAIC_OPS", frozenset({op}))
    monkeypatch.setattr(dispatch, "MOSAIC_BEST", frozenset({op}))
    where: dict[str, Any] = {
        "platform": "gpu",
        "device_kind": device_kind,
        "shape": dataclasses.replace(SHAPE, **change),
    }
    with pytest.raises(ValueError, match=f"'mosaic' of {op}: {reason}"):
        resolve_kernels("mosaic", **where)
    with caplog.at_level("INFO", logger="pallas_kernels"):
        assert resolve_kernels(None, **where) == KernelChoice.uniform("triton")
    assert re.search(f"{op}: triton and not mosaic: {reason}", caplog.text)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_bmm_baseline_differs_in_lora_alone(platform: str) -> None:
    where: dict[str, Any] = {"platform": platform, "device_kind": H200, "shape": SHAPE}
    best, bmm = resolve_kernels(None, **where), resolve_kernels("bmm", **where)
    assert bmm.lora_shrink == bmm.lora_expand == "bmm"
    assert dataclasses.replace(
        bmm, lora_shrink=best.lora_shrink, lora_expand=best.lora_expand
    ) == best  # fmt: skip


def test_a_choice_names_what_differs() -> None:
    choice = dataclasses.replace(KernelChoice.uniform("triton"), rope_write="xla")
    assert str(choice) == "triton, rope_write xla"


@pytest.mark.parametrize(
    ("requested", "platform", "message"),
    [
        ("triton", "cpu", "'triton' does not run on platform 'cpu', which has \\['xla', 'bmm'\\]"),
        ("cuda", "gpu", "'cuda' is not one of \\['xla', 'triton', 'mosaic', 'bmm'\\]"),
        (None, "tpu", "platform 'tpu' is not one of"),
    ],
)
def test_what_cannot_run_is_refused_and_never_replaced(
    requested: str | None, platform: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_kernels(requested, platform=platform, device_kind=H200, shape=SHAPE)


def test_a_measured_configuration_is_found_by_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        num_warps: int
        num_stages: int = 1

    config = {"num_warps": 2}
    table = {"lora_shrink": {"num_rows=64,width=4096": {"config": config, "us": 9.5}}}
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "some-gpu.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuning_table.importlib.resources, "files", lambda _: tmp_path)
    tuning_table._table.cache_clear()
    key = tuning_table.shape_key(width=4096, num_rows=64)
    try:
        found = tuning_table.tuned("lora_shrink", key, Config, device="some-gpu")
        assert found == Config(**config)
        assert tuning_table.tuned("lora_shrink", "width=1", Config, device="some-gpu") is None
        assert tuning_table.tuned("lora_shrink", key, Config, device="no-gpu") is None
    finally:
        tuning_table._table.cache_clear()


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_a_popularity_names_slots_that_exist(popularity: str) -> None:
    slots = row_slots(popularity, 100, 10, seed=0)
    assert (slots.shape, slots.dtype) == ((100,), np.int32)
    counts = np.bincount(slots, minlength=11)
    if popularity == "base-only":
        assert counts[0] == 100
    else:
        assert counts[0] == 0
        assert len(counts) == 11
    if popularity == "distinct":
        assert (counts[1:] == 10).all()
    if popularity == "identical":
        assert counts.max() == 100
    if popularity == "zipf":
        assert counts[1] > counts[4:].max()


def test_an_unknown_popularity_is_refused() -> None:
    with pytest.raises(ValueError, match="'skewed' is not one of"):
        row_slots("skewed", 1, 1, seed=0)


def test_model_shapes_give_the_sizes_of_their_modules() -> None:
    shape = MODELS["llama-3.1-8b"]
    assert shape.page_elems == 2 * 16 * 8 * 128
    assert [shape.module_sizes(module) for module in range(7)] == [
        (4096, 4096),
        (4096, 1024),
        (4096, 1024),
        (4096, 4096),
        (4096, 14336),
        (4096, 14336),
        (14336, 4096),
    ]
