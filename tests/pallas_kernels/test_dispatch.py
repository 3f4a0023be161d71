"""The choice of an implementation, of a configuration, and the named shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pallas_kernels import tuning_table
from pallas_kernels.dispatch import resolve_implementation
from pallas_kernels.lora_shrink_triton import Config
from pallas_kernels.shapes import MODELS, POPULARITIES, row_slots


@pytest.mark.parametrize(
    ("requested", "platform", "chosen"),
    [
        (None, "cpu", "xla"),
        (None, "gpu", "triton"),
        (None, "cuda", "triton"),
        ("xla", "gpu", "xla"),
        ("triton", "gpu", "triton"),
    ],
)
def test_the_choice_is_the_request_or_the_best(
    requested: str | None, platform: str, chosen: str
) -> None:
    assert resolve_implementation(requested, platform) == chosen


@pytest.mark.parametrize(
    ("requested", "platform", "message"),
    [
        ("triton", "cpu", "'triton' does not run on platform 'cpu', which has \\['xla'\\]"),
        ("mosaic", "gpu", "'mosaic' is not one of \\['xla', 'triton'\\]"),
        (None, "tpu", "platform 'tpu' is not one of"),
    ],
)
def test_what_cannot_run_is_refused_and_never_replaced(
    requested: str | None, platform: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_implementation(requested, platform)


def test_a_measured_configuration_is_found_by_its_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "block_ranks": 8,
        "block_chunks": 2,
        "matvec": True,
        "num_warps": 2,
        "num_stages": 1,
    }
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
