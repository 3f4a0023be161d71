"""Made-up adapters: all different, all of the paper's distribution, all of the ranks asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from bench.geometries import write_geometry
from bench.random_adapters import random_adapter_loader, random_path
from checkpoints.hf_config import read_model_config
from checkpoints.model_config import ModelConfig
from sloraj.config import PoolLayout


@pytest.fixture
def tiny(tmp_path: Path) -> ModelConfig:
    return read_model_config(write_geometry("tiny", tmp_path / "model"))


def _layout(config: ModelConfig, dtype: str = "bfloat16") -> PoolLayout:
    return PoolLayout(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        page_size=16, tp=1, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_two_adapters_have_a_page_in_common(tiny: ModelConfig, dtype: str) -> None:
    load = random_adapter_loader(tiny, _layout(tiny, dtype), 64)
    seen = set()
    for number in range(50):
        packed, _ = load(random_path(8, number))
        for page in packed.pages:
            seen.add(hashlib.sha256(page.tobytes()).hexdigest())
    assert len(seen) == 50 * packed.num_pages


def test_weights_are_uniform_over_the_papers_range(tiny: ModelConfig) -> None:
    packed, _ = random_adapter_loader(tiny, _layout(tiny, "float32"), 64)(random_path(16, 3))
    values = packed.pages[packed.pages != 0]
    assert np.abs(values).max() <= 1e-3  # the scaling is 16 / 16
    assert abs(values.mean()) < 2e-5
    assert values.std() == pytest.approx(2e-3 / 12**0.5, rel=0.02)


def test_an_adapter_is_the_same_each_time_and_has_the_modules_asked_for(tiny: ModelConfig) -> None:
    path = random_path(4, 7, ("q_proj", "v_proj"))
    layout = _layout(tiny)
    one, other = (random_adapter_loader(tiny, layout, 64)(path)[0] for _ in range(2))
    assert one.pages.tobytes() == other.pages.tobytes()
    assert (one.segments[:, :, 3] == [4, 0, 4, 0, 0, 0, 0]).all()
