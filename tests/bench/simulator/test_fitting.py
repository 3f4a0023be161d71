"""A model is recovered from runs that were made with it, and predicts others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench.clock import SimulatedClock
from bench.records import RecordError, header
from bench.replay import Replay
from bench.simulator import fit as fit_command
from bench.simulator import validate as validate_command
from bench.simulator.cost import Cost
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import EngineDescription, register, simulated_core
from bench.simulator.features import StepFeatures
from bench.simulator.fitting import fit
from bench.simulator.run_file import BENCH, read_run, run_settings, write_run
from bench.simulator.validation import compare
from bench.step_trace import StepTrace
from tests.bench.simulator.engines import description, device, trace

RANKS = [4 << i % 3 for i in range(8)]


def recorded(
    path: Path, seed: int, *, rate: float = 60.0, num: int = 60, num_adapters: int = 8,
    model: DeviceModel | None = None, engine: EngineDescription | None = None,
) -> Path:  # fmt: skip
    """A run on a simulated device, written as a real one is."""
    engine, clock = engine or description(num_pages=300, max_model_len=128), SimulatedClock()
    core = simulated_core(engine, model or device(), clock)
    register(core, RANKS)
    steps = StepTrace(core, engine, clock.now)
    requests = trace(seed, num, rate, num_adapters)
    result = Replay(
        core, requests, clock, vocab_size=512, prompt=lambda i, r: [0] * r.num_prompt_tokens
    ).run()
    steps.close()
    head = header(bench=BENCH, device="imaginary", settings=run_settings(engine, RANKS), seed=seed)
    write_run(path, head, steps.steps(), result.outcomes)
    return path


def test_a_run_comes_out_of_its_file_as_it_went_in(tmp_path: Path) -> None:
    run = read_run(recorded(tmp_path / "a.jsonl", 1))
    assert run.engine == description(num_pages=300, max_model_len=128)
    assert run.trace == trace(1, 60, 60.0, 8)
    assert run.adapter_ranks == RANKS
    assert sum(step.features.num_tokens for step in run.steps) >= sum(
        o.num_prompt_tokens + o.num_output_tokens - 1 for o in run.outcomes
    )


def test_a_file_of_another_bench_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_run(path, {"bench": "serving"}, [], [])
    with pytest.raises(RecordError, match="serving"):
        read_run(path)


def test_the_model_that_made_the_runs_predicts_them_exactly(tmp_path: Path) -> None:
    found = compare(read_run(recorded(tmp_path / "a.jsonl", 1)), device())
    assert found["throughput_error"] < 1e-6
    assert found["first_token_error"] < 1e-4


def test_a_fitted_model_predicts_runs_that_it_was_not_fitted_on(tmp_path: Path) -> None:
    fitted = fit(
        [
            read_run(recorded(tmp_path / "a.jsonl", 1)),
            read_run(recorded(tmp_path / "b.jsonl", 2, rate=10.0)),
            read_run(recorded(tmp_path / "c.jsonl", 3, num_adapters=0)),
        ]
    )
    assert fitted.head_start_s == pytest.approx(device().head_start_s, abs=1e-4)
    for seed, changes in enumerate(({}, {"rate": 25.0}, {"num_adapters": 3}), start=10):
        run = read_run(recorded(tmp_path / f"{seed}.jsonl", seed, **changes))
        found = compare(run, fitted)
        assert found["throughput_error"] < 0.02
        assert found["first_token_error"] < 0.03


def test_the_device_is_told_from_a_host_that_is_slower(tmp_path: Path) -> None:
    """Where collect never waits, the device's time is only bounded; the host's is what counts."""
    slow_host = dataclasses.replace(device(), execute=Cost({"step": 0.05}))
    fitted = fit([read_run(recorded(tmp_path / "a.jsonl", 1, model=slow_host))])
    run = read_run(recorded(tmp_path / "b.jsonl", 2, model=slow_host, rate=5.0))
    assert compare(run, fitted)["throughput_error"] < 0.02


def features(**changes: Any) -> StepFeatures:
    none = dict.fromkeys((f.name for f in dataclasses.fields(StepFeatures)), 0)
    return StepFeatures(**(none | {"bucket": "decode-4", "variant": "base"} | changes))


@pytest.mark.parametrize(
    ("bucket", "seconds"),
    [("decode-1", 1.0), ("decode-4", 2.0), ("decode-8", 4.0), ("decode-2", 4 / 3),
     ("mixed-64", 5.0), ("mixed-256", 10.0)],
)  # fmt: skip
def test_a_bucket_never_seen_lies_between_its_neighbours(bucket: str, seconds: float) -> None:
    cost = Cost({"bucket:decode-1": 1.0, "bucket:decode-4": 2.0, "bucket:mixed-128": 5.0})
    chunks = int(bucket.startswith("mixed"))
    assert cost.seconds(features(bucket=bucket, num_chunks=chunks)) == pytest.approx(seconds)


def test_a_cost_is_what_its_columns_add_up_to() -> None:
    from bench.simulator.cost import device_columns

    coefficients = device().device.coefficients
    given = features(
        bucket="decode-4", variant="attention", context_tokens=100, adapter_elements=5000,
        adapter_products=9000, num_installs=2, install_bytes=10_000,
    )  # fmt: skip
    wanted = sum(coefficients.get(name, 0.0) * value for name, value in device_columns(given))
    assert device().device.seconds(given) == pytest.approx(wanted)


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_installs: got -1"):
        Cost({"num_installs": -1.0})


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    device().save(tmp_path / "m.json")
    assert DeviceModel.load(tmp_path / "m.json").as_dict() == device().as_dict()
    (tmp_path / "n.json").write_text("{}")
    with pytest.raises(ValueError, match="no model"):
        DeviceModel.load(tmp_path / "n.json")


def test_fit_and_validate_as_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = recorded(tmp_path / "a.jsonl", 1), recorded(tmp_path / "b.jsonl", 2)
    model, out = tmp_path / "m.json", tmp_path / "simulator.json"
    monkeypatch.setattr("sys.argv", ["fit", "--runs", str(first), "--out", str(model)])
    fit_command.main()
    common = ["validate", "--model", str(model), "--out", str(out), "--runs"]
    monkeypatch.setattr("sys.argv", [*common, str(second)])
    validate_command.main()
    assert "| b |" in capsys.readouterr().out
    entries = json.loads(out.read_text())["targets"]
    assert [(entry["number"], entry["met"]) for entry in entries] == [("C5", True)] * 2
    monkeypatch.setattr("sys.argv", [*common, str(first)])
    with pytest.raises(SystemExit, match="fitted on"):
        validate_command.main()


def test_features_agree_with_the_batch_log() -> None:
    """Two counts of the same batches, written apart."""
    engine, clock = description(num_pages=300, max_model_len=128), SimulatedClock()
    core = simulated_core(engine, device(), clock)
    register(core, RANKS)
    steps = StepTrace(core, engine, clock.now)
    requests = trace(4, 40, 60.0, 8)
    result = Replay(
        core, requests, clock, vocab_size=512, model=engine.model,
        prompt=lambda i, r: [0] * r.num_prompt_tokens,
    ).run()  # fmt: skip
    steps.close()
    shared = (
        "num_tokens", "num_decoding", "num_sampled", "context_tokens", "prompt_pairs",
        "num_adapters", "adapter_elements", "adapter_products",
    )  # fmt: skip
    traced = [tuple(getattr(s.features, name) for name in shared) for s in steps.steps()]
    assert traced == [tuple(getattr(work, name) for name in shared) for work in result.work]
    installed = sum(step.features.num_installs for step in steps.steps())
    assert installed == result.counters["adapter_installs"]


def test_a_slot_bound_before_the_trace_began_is_known() -> None:
    engine, clock = description(), SimulatedClock()
    core = simulated_core(engine, device(), clock)
    register(core, RANKS)

    def run() -> list[StepFeatures]:
        steps = StepTrace(core, engine, clock.now)
        requests = [dataclasses.replace(r, adapter=3) for r in trace(4, 3, 60.0, 8)]
        Replay(
            core, requests, clock, vocab_size=512, prompt=lambda i, r: [0] * r.num_prompt_tokens
        ).run()
        steps.close()
        return [step.features for step in steps.steps()]

    cold, warm = run(), run()
    assert sum(f.num_installs for f in cold) == 1 and not any(f.num_installs for f in warm)
    assert {f.adapter_elements for f in warm} == {f.adapter_elements for f in cold}
