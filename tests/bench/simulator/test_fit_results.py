"""The first model, from results that lie in the repository: its batches are those measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.offline import _Workload
from bench.simulator.fit_results import (
    check,
    drawn_adapters,
    fit_results,
    offline_observations,
    read_result,
)

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "nvidia-h200"


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf"])
def test_adapters_are_drawn_as_the_benchmark_draws_them(popularity: str) -> None:
    settings = {"geometry": "llama-7b", "requests": 50, "input": 16, "adapters": 20,
                "popularity": popularity}  # fmt: skip
    workload = _Workload(SimpleNamespace(**settings))  # type: ignore[arg-type]
    drawn = [f"adapter-{i}" for i in drawn_adapters(settings, 32000)]
    assert workload.adapters_of("warm") == drawn


def test_scheduling_again_gives_the_very_steps_that_were_measured() -> None:
    result = read_result(RESULTS, "offline-512.json")
    observed = list(offline_observations(result, "warm"))
    for name, bucket in result["warm"]["buckets"].items():
        found = [o for o in observed if o.features.bucket == name]
        assert len(found) == bucket["steps"]
        assert found[0].features.num_tokens == pytest.approx(bucket["mean_tokens"], abs=0.6)


def test_the_first_model_predicts_another_run_of_another_size() -> None:
    fitted = [("offline-1000.json", "base"), ("offline-1000.json", "warm")]
    model = fit_results(RESULTS, "step-7b.json", fitted)
    for mode in ("base", "warm"):
        found = check(read_result(RESULTS, "offline-512.json"), "offline-512.json", mode, model)
        assert found["throughput_error"] < 0.05
        assert found["first_token_error"] < 0.10
