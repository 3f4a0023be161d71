"""The sweeps run whole on a CPU, and their points differ in what they say they differ in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import sweep
from bench.columns import from_columns, to_columns
from bench.geometries import write_geometry
from bench.measures import measures, point_trace, steady
from bench.point_run import run_point
from bench.point_setup import capped_pool_bytes, with_policies
from bench.points import Point
from bench.records import RecordError, read_records
from bench.report import make_report
from bench.settings import KV_BUDGETS
from bench.shards import QUICK, SHARDS, TINY
from bench.slo import summarise
from bench.sweep import ShardRun
from bench.sweep_bases import base_name, base_of, with_bases
from bench.sweep_engine import SweepEngine
from checkpoints.hf_config import read_model_config
from sloraj.config import EngineConfig
from tests.bench.outcomes import outcome
from tests.sloraj.core_driver import DEFAULT_CONFIG

ALL = [point for points in (*SHARDS.values(), QUICK) for point in points]
SMALL: dict[str, Any] = {
    "figure": "ablation", "engine": TINY, "num_adapters": 8, "pool_pages": 160,
    "num_requests": 12, "input_range": (4, 32), "output_range": (4, 24),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SweepEngine]:
    started = SweepEngine(TINY, tmp_path_factory.mktemp("engine"))
    yield started
    started.close()


def test_every_point_has_a_key_of_its_own_in_its_shard() -> None:
    for points in (*SHARDS.values(), QUICK):
        assert len({point.key for point in points}) == len(points)


def test_shards_that_are_run_together_share_bases_that_drain_as_their_points_do() -> None:
    together = with_bases([*SHARDS["retention-7b"], *SHARDS["core-7b"], *SHARDS["retention-7b"]])
    assert len({point.key for point in together}) == len(together)
    bases = [point for point in together if point.figure == "base"]
    assert [(base.pool, base.num_requests) for base in bases] == [("full", 768), ("24 GB", 256)]
    merged = with_bases([*SHARDS["core-7b"], *SHARDS["merged"]])
    assert ("full", 512) in [(p.pool, p.num_requests) for p in merged if p.figure == "base"]


def test_every_point_is_measured_against_a_base_on_its_own_pool() -> None:
    for points in SHARDS.values():
        whole = with_bases(points)
        for point in points:
            bases = [p for p in whole if p.num_adapters == 0 and base_name(p) == base_name(point)]
            assert bases[0].is_saturated and bases[0].pool == point.pool
            assert whole.index(bases[0]) < whole.index(point)


def test_saturated_points_drain_as_their_base_does() -> None:
    for points in SHARDS.values():
        for point in points:
            if point.is_saturated and point.system != "bmm":
                assert point.num_requests == point.base_requests == base_of(point).num_requests


def test_every_policy_of_the_grid_is_one_that_the_scheduler_sees() -> None:
    config, engine = DEFAULT_CONFIG, EngineConfig(model="any")
    for point in ALL:
        changed = with_policies(config, engine, dict(point.policies))
        assert (changed != config) == bool(point.policies), point.key


def test_a_point_offers_its_load_in_one_way() -> None:
    for wrong in ({}, {"load": 0.5, "rate": 2.0}, {"num_requests": 3, "load": 0.5}):
        with pytest.raises(ValueError, match="allowed: exactly one of them"):
            Point(figure="f", engine=TINY, **wrong)
    with pytest.raises(ValueError, match="with the base's rate measured before"):
        point_trace(Point(figure="f", engine=TINY, load=0.5), None)


@pytest.mark.parametrize("point", ALL, ids=lambda point: point.key)
def test_traces_are_what_their_points_say(point: Point) -> None:
    trace = point_trace(point, 4.0)
    if point.num_requests is not None:
        assert len(trace) == point.num_requests
        assert {request.arrival_s for request in trace} == {0.0}
    elif point.load is not None and point.flood is None:
        assert len(trace) == int(point.load * 4.0 * point.duration_s)
    adapters = {request.adapter for request in trace}
    assert (adapters == {None}) == (point.num_adapters == 0)
    assert max((a for a in adapters if a is not None), default=-1) < max(point.num_adapters, 1)
    assert {point.input_range[0] <= r.num_prompt_tokens < point.input_range[1] for r in trace} == {
        True
    }


def test_saturated_traces_differ_in_their_adapters_alone() -> None:
    few, many = (dataclasses.replace(Point(**SMALL), num_adapters=n) for n in (2, 8))
    pairs = zip(point_trace(few, None), point_trace(many, None), strict=True)
    assert all(
        (a.num_prompt_tokens, a.num_output_tokens) == (b.num_prompt_tokens, b.num_output_tokens)
        for a, b in pairs
    )


def test_each_point_starts_with_no_adapter_on_the_device(engine: SweepEngine) -> None:
    one, other = (run_point(engine, Point(**SMALL), None) for _ in range(2))
    used = len(set(one["requests"]["adapter"]))
    assert one["counters"]["adapter_installs"] >= used
    assert other["counters"]["adapter_installs"] >= used
    assert one["summary"]["num_finished"] == 12
    assert one["requests"]["num_output_tokens"] == one["requests"]["num_wanted_tokens"]
    assert one["trace_digest"] == other["trace_digest"]
    assert 0 < one["ceiling"] < 1
    assert one["counters"]["runner_compiles_after_ready"] == 0


def test_a_core_has_the_pages_that_its_point_gives_it(engine: SweepEngine) -> None:
    small = run_point(engine, Point(**SMALL | {"pool_pages": 80}), None)
    large = run_point(engine, Point(**SMALL), None)
    assert small["counters"]["num_pages"] == 79 and large["counters"]["num_pages"] == 159
    assert small["pool"]["bytes"] * 2 == large["pool"]["bytes"]
    with pytest.raises(ValueError, match="allowed: at most the device's"):
        run_point(engine, Point(**SMALL | {"pool_pages": 1 << 30}), None)


def test_padding_and_a_split_are_seen_in_the_pages(engine: SweepEngine) -> None:
    plain = run_point(engine, Point(**SMALL), None)
    padded = run_point(engine, Point(**SMALL | {"pad_ranks": True}), None)
    split = run_point(engine, Point(**SMALL | {"adapter_share": 0.1}), None)
    assert padded["ceiling"] < plain["ceiling"]
    assert split["steps"]["adapter_pages_at_most"] <= 15
    assert plain["steps"]["adapter_pages_at_most"] > 15


def test_policies_are_fields_that_the_scheduler_sees(engine: SweepEngine) -> None:
    changed = with_policies(engine._config, engine._engine_config, {"max_num_waiting": 7})
    assert changed == dataclasses.replace(engine._config, max_num_waiting=7)
    with pytest.raises(ValueError, match="got 'no_such', allowed: a field of EngineConfig"):
        with_policies(engine._config, engine._engine_config, {"no_such": 1})
    with pytest.raises(ValueError, match="allowed: fields that the scheduler sees"):
        with_policies(engine._config, engine._engine_config, {"kernels": "xla"})


def test_a_cap_leaves_what_the_papers_gpus_had(tmp_path: Path) -> None:
    """The paper's own pools, in tokens of KV cache, within a tenth."""
    for setting, geometry, gpu, gb in (
        ("S2", "llama-7b", "A10G", 24), ("S2", "llama-7b", "A100-80GB", 80),
        ("S4", "llama-13b", "A100-40GB", 40), ("S4", "llama-13b", "A100-80GB", 80),
    ):  # fmt: skip
        config = read_model_config(write_geometry(geometry, tmp_path / geometry))
        token_bytes = config.num_layers * 2 * config.kv_size * 2
        tokens = capped_pool_bytes(config, gb) / token_bytes
        assert tokens == pytest.approx(KV_BUDGETS[gpu, setting], rel=0.1), (setting, gpu)
    with pytest.raises(ValueError, match="allowed: less than the total"):
        capped_pool_bytes(config, 20)


def test_an_engine_with_a_pool_of_its_own_holds_that_of_its_points(tmp_path: Path) -> None:
    for point in ALL:
        if point.engine.pool_bytes is not None and point.pool_gb is not None:
            geometry = point.engine.geometry
            config = read_model_config(write_geometry(geometry, tmp_path / geometry))
            assert capped_pool_bytes(config, point.pool_gb) <= point.engine.pool_bytes


def test_columns_give_back_the_outcomes() -> None:
    outcomes = [outcome(0, 0.0, 1.25), outcome(1, 2.0, None)]
    columns = to_columns(outcomes)
    assert "retry_after_s" not in columns  # nobody had one
    found = from_columns(columns)
    want = [dataclasses.replace(o, gaps_s=None, adapter=o.index) for o in outcomes]
    assert found == want
    assert summarise(found) == summarise(outcomes)


def test_the_steady_rate_is_that_of_a_server_that_never_rests() -> None:
    """A request of 10 + 10 tokens every second, done in one second each, is 1 request/s."""
    outcomes = [
        outcome(i, 0.0, i + 0.1, prompt=10, tokens=10, gap_s=0.1) for i in range(200)
    ]  # fmt: skip
    found = steady(outcomes)
    assert found is not None
    assert found["requests_per_s"] == pytest.approx(1.0, rel=0.02)
    assert steady(outcomes[:1]) is None
    assert measures(outcomes, None)["summary"]["num_finished"] == 200


def test_the_quick_sweep_runs_whole_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sweep", "run", "--quick", "--out", str(tmp_path)])
    assert sweep.main() == 0
    (path,) = tmp_path.glob("*.jsonl")
    head, records = read_records(path)
    assert {record["key"] for record in records} == {p.key for p in with_bases(QUICK)}
    assert not [record["error"] for record in records if "error" in record]
    for record in records:
        assert set(record["summary"]["errors"]) <= {"FirstTokenTooLate"}
        if record["point"]["figure"] != "abort":
            assert record["summary"]["num_finished"] == record["summary"]["num_requests"]
        assert record["counters"]["runner_compiles_after_ready"] == 0
    assert head["settings"]["engine"]["geometry"] == "demo"
    rows = (tmp_path / sweep.TABLE).read_text().splitlines()
    assert len(rows) == 1 + len(records)
    assert "ready in" in capsys.readouterr().out
    assert sweep.main() == 0
    assert "ready in" not in capsys.readouterr().out  # no engine was started
    assert read_records(path) == (head, records)
    make_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    for record in records[1:]:
        assert f"{record['summary']['requests_per_s']:.2f}" in page
    assert {plot.stem for plot in (tmp_path / "plots").iterdir()} >= {"num-adapters", "ablation"}


def test_a_file_of_another_engine_is_refused(tmp_path: Path, engine: SweepEngine) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"header": {"bench": "sweep", "device": "other"}}\n')
    run = ShardRun(TINY, [Point(**SMALL)], path)
    assert [point.key for point in run.todo] == [base_of(Point(**SMALL)).key, Point(**SMALL).key]
    with pytest.raises(RecordError, match="device is 'other'"):
        sweep.RecordFile.resume(
            path, {"bench": "sweep", "device": engine.device, "commit": "c", "settings": {}}
        )
