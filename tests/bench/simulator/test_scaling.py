"""A model carried over: unchanged where nothing changes, and no better than its link."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import floors
from bench.simulator import beyond, scaling
from bench.simulator.cost import Cost
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import EngineDescription
from bench.simulator.geometry import (
    describe_geometry,
    model_config,
    weight_bytes,
)
from bench.simulator.saturation import saturated_rate
from bench.simulator.scaling import Link, lora_collectives_s, program_floor_s, scaled
from sloraj.runner import memory
from tests.bench.simulator.engines import description, device

FREE = Link(all_reduce_s=0.0, all_gather_s=0.0, bytes_per_s=float("inf"))


def fitted() -> DeviceModel:
    """About what a 7B model takes on a fast GPU."""
    return DeviceModel(
        device=Cost(
            {
                "bucket:decode-1": 0.0042, "bucket:decode-64": 0.0043, "bucket:mixed-2048": 0.044,
                "context_tokens": 1.4e-7, "prompt_pairs": 2.3e-9, "decode:attention": 0.0003,
                "decode:adapter_elements": 6e-13,
            }
        ),
        execute=Cost({"step": 0.002}), between=Cost({}), bus_bytes_per_s=2e10, bus_latency_s=1e-5,
        origin={"device": "imaginary", "geometry": "llama-7b", "commit": "none", "runs": []},
    )  # fmt: skip


def engine(geometry: str = "llama-7b", tp: int = 1) -> EngineDescription:
    return describe_geometry(geometry, pool_bytes=40e9, max_num_seqs=64, max_rank=64, tp=tp)


def test_onto_itself_nothing_changes() -> None:
    same = scaled(fitted(), model_config("llama-7b"), engine(), Link())
    for name, value in fitted().device.coefficients.items():
        assert same.device.coefficients[name] == pytest.approx(value)
    assert same.bus_bytes_per_s == fitted().bus_bytes_per_s
    lora = [v for n, v in same.device.coefficients.items() if n.endswith("64:attention")]
    assert lora == [0.0] * len(lora)


def test_more_gpus_are_faster_but_never_by_more_than_their_number() -> None:
    source = model_config("llama-7b")
    steps = [
        scaled(fitted(), source, engine("llama-30b", tp), FREE).device.bucket_s("mixed-2048")
        for tp in (1, 2, 4)
    ]
    assert steps[0] > steps[1] > steps[2] > steps[0] / 4


def test_what_collectives_take_comes_on_top_of_the_free_link() -> None:
    """Latencies of 2 all-reduces a layer and one of the embedding, and one gathering of logits;
    with adapters on attention, a gathering and a reduction a layer more (docs/design.md).
    """
    source, target = model_config("llama-7b"), engine("llama-30b", 4)
    layers = target.model.num_layers
    free = scaled(fitted(), source, target, FREE).device
    slow = scaled(
        fitted(), source, target,
        Link(all_reduce_s=1.0, all_gather_s=100.0, bytes_per_s=float("inf")),
    ).device  # fmt: skip
    added = slow.bucket_s("decode-1") - free.bucket_s("decode-1")
    assert added == pytest.approx(2 * layers + 1 + 100)
    assert slow.coefficients["bucket:decode-1:attention"] == pytest.approx(layers * 101)


def test_bytes_of_lora_collectives_are_those_of_the_design() -> None:
    """5 (N - 1) T R / N elements a layer, of four bytes."""
    target = engine("llama-30b", 4)
    bucket = target.buckets.mixed[-1]
    link = Link(all_reduce_s=0.0, all_gather_s=0.0, bytes_per_s=1.0)
    elements = 5 * 3 * bucket.num_tokens * target.scheduler.max_rank / 4
    expected = target.model.num_layers * elements * 4
    assert lora_collectives_s(target, bucket, link) == pytest.approx(expected)


def test_constants_are_those_of_engine_and_floors() -> None:
    assert floors.READ_BYTES_PER_S == scaling.READ_BYTES_PER_S
    assert floors.FLOPS_PER_S == scaling.FLOPS_PER_S
    engine = describe_geometry("llama-7b", pool_bytes=1e9)  # a page of 16 tokens takes 8 MiB
    assert engine.scheduler.install_pages_per_step == memory.INSTALL_BYTES_PER_STEP // (8 << 20)


@pytest.mark.parametrize(
    ("geometry", "billions"),
    [("llama-7b", 6.7), ("llama-13b", 13.0), ("llama-30b", 32.5), ("llama-70b", 69.0)],
)
def test_geometries_have_the_parameters_of_their_names(geometry: str, billions: float) -> None:
    assert weight_bytes(model_config(geometry)) / 2e9 == pytest.approx(billions, rel=0.01)


def test_the_floor_of_one_row_is_reading_all_weights_once() -> None:
    model = model_config("llama-7b")
    read = weight_bytes(model) - 2 * model.vocab_size * model.hidden_size  # all but the embedding
    assert program_floor_s(model, 1, 1, 1) == pytest.approx(read / 4.03e12, rel=0.001)


def test_saturation_is_rows_over_the_time_of_a_request() -> None:
    """4 rows, prompts of one step, answers of 20 tokens: 21 steps a request, 4 at once."""
    constant = DeviceModel(
        device=Cost({"step": 0.01}), execute=Cost({}), between=Cost({}), bus_bytes_per_s=1e12,
        bus_latency_s=0.0,
    )  # fmt: skip
    per_s = saturated_rate(
        description(max_num_batched_tokens=64), constant, inputs=(4, 5), outputs=(20, 21),
        num_requests=200,
    )  # fmt: skip
    assert per_s == pytest.approx(4 / (20 * 0.01), rel=0.03)


def test_saturation_wants_more_requests_than_fit() -> None:
    with pytest.raises(ValueError, match="more than fit at once"):
        saturated_rate(description(), device(), inputs=(4, 5), outputs=(2, 3), num_requests=2)


def test_the_command_gives_every_point_of_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted().save(tmp_path / "m.json")
    monkeypatch.setattr(beyond, "PARALLEL", [("S7", 2), ("S7", 4)])
    monkeypatch.setattr(beyond, "COUNTS", {"one GPU": (0, 20), "parallel": (10,)})
    monkeypatch.setattr(
        "sys.argv",
        ["beyond", "--model", str(tmp_path / "m.json"), "--requests", "60", "--max-num-seqs", "8",
         "--commit", "x", "--out", str(tmp_path / "beyond.json")],
    )  # fmt: skip
    beyond.main()
    assert "| S7 | 4 | 10 | adapters |" in capsys.readouterr().out
    result = json.loads((tmp_path / "beyond.json").read_text())
    assert result["device"].startswith("simulated")
    by_kind = {(p["gpus"], p["kind"]): p["requests_per_s"] for p in result["points"][2:]}
    for gpus in (2, 4):
        free, real = (by_kind[gpus, kind] for kind in ("adapters without collectives", "adapters"))
        assert real < free <= by_kind[gpus, "base"]
    assert by_kind[4, "base"] > by_kind[2, "base"]
