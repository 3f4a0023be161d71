"""The ceiling of retention: one without adapters, and what their bytes say with them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from bench.batch_log import StepWork
from bench.ceiling import retention_ceiling, step_floor_s
from bench.floors import Peaks
from bench.geometries import write_geometry
from bench.step_floor import decode_floor_s, prefill_floor_s
from checkpoints.hf_config import read_model_config
from checkpoints.model_config import ModelConfig

ROWS, CONTEXT, RANK = 64, 512, 8


@pytest.fixture
def llama(tmp_path: Path) -> ModelConfig:
    return read_model_config(write_geometry("llama-7b", tmp_path / "model"))


def _decode(config: ModelConfig, num_adapters: int) -> StepWork:
    each = 4 * 2 * config.hidden_size * RANK * config.num_layers
    return StepWork(
        num_tokens=ROWS, num_decoding=ROWS, num_sampled=ROWS, context_tokens=ROWS * CONTEXT,
        prompt_pairs=0, num_adapters=num_adapters, adapter_elements=num_adapters * each,
        adapter_products=ROWS * each if num_adapters else 0,
    )  # fmt: skip


def test_a_decode_step_has_the_floor_that_the_step_benchmark_gives_it(llama: ModelConfig) -> None:
    peaks = Peaks()
    step = _decode(llama, ROWS)
    base = decode_floor_s(llama, peaks, context=CONTEXT, ranks=[0] * ROWS)
    full = decode_floor_s(llama, peaks, context=CONTEXT, ranks=[RANK] * ROWS)
    assert step_floor_s(llama, peaks, step, with_adapters=False) == pytest.approx(base)
    assert step_floor_s(llama, peaks, step, with_adapters=True) == pytest.approx(full)
    assert retention_ceiling(llama, [step]) == pytest.approx(base / full)


def test_a_prefill_step_has_the_floor_that_the_step_benchmark_gives_it(llama: ModelConfig) -> None:
    prompts, length = 4, 512
    step = StepWork(prompts * length, 0, prompts, 0, prompts * length * (length + 1) // 2, 0, 0, 0)
    want = prefill_floor_s(llama, Peaks(), prompts=prompts, length=length)
    assert step_floor_s(llama, Peaks(), step, with_adapters=False) == pytest.approx(want)


def test_fewer_distinct_adapters_raise_the_ceiling_and_none_makes_it_one(
    llama: ModelConfig,
) -> None:
    found = [retention_ceiling(llama, [_decode(llama, n)]) for n in (0, 1, 16, 64)]
    assert found[0] == 1.0
    assert all(a is not None and b is not None and a > b for a, b in itertools.pairwise(found))
    assert retention_ceiling(llama, []) is None


def test_steps_weigh_by_their_time(llama: ModelConfig) -> None:
    with_all, base = _decode(llama, 64), _decode(llama, 0)
    low, high = retention_ceiling(llama, [with_all]), retention_ceiling(llama, [with_all, base])
    assert low is not None and high is not None and low < high < 1
    big = dataclasses.replace(with_all, context_tokens=100 * with_all.context_tokens)
    assert retention_ceiling(llama, [big]) > low  # type: ignore[operator]
