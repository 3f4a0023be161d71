"""Metrics: bounded series, the names routers read, and numbers that add up."""

from __future__ import annotations

import concurrent.futures
import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.app import create_app
from serving.config import ServerConfig
from serving.metrics import MAX_ADAPTER_LABELS
from sloraj.policies.settings import QueueConfig
from tests.serving.fake_engine import FakeEngine
from tests.sloraj.core_driver import CoreDriver


def scrape(client: TestClient) -> dict[str, float]:
    response = client.get("/metrics", follow_redirects=False)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_tokens_requests_and_choices_add_up(client: TestClient) -> None:
    client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "n": 2})
    client.post("/v1/completions", json={"prompt": "a", "model": "shift-1", "stream": True})
    series = scrape(client)
    assert series["sloraj:prompt_tokens_total"] == 4 + 2
    assert series["sloraj:generation_tokens_total"] == 10 + 16
    assert series['sloraj:choices_total{reason="length"}'] == 3
    assert series['sloraj:adapter_requests_total{adapter="base"}'] == 1
    assert series['sloraj:adapter_requests_total{adapter="shift-1"}'] == 1
    assert series["sloraj:time_to_first_token_seconds_count"] == 2
    name = 'sloraj:http_requests_total{handler="/v1/completions",method="POST",status="200"}'
    assert series[name] == 2
    assert series["sloraj:engine_runner_compiles"] == 0


def test_the_five_names_that_routers_read(client: TestClient) -> None:
    series = scrape(client)
    labels = '{engine="0",model_name="fake-base"}'
    assert series[f"vllm:num_requests_running{labels}"] == 0
    assert series[f"vllm:num_requests_waiting{labels}"] == 0
    assert series[f"vllm:kv_cache_usage_perc{labels}"] == pytest.approx(0.1)
    cache = 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="101"}'
    assert series[cache] == 1


def test_residency_is_one_live_series(client: TestClient, engine: FakeEngine) -> None:
    def lora_series() -> list[str]:
        return [name for name in scrape(client) if name.startswith("vllm:lora_requests_info")]

    assert len(lora_series()) == 1
    assert 'running_lora_adapters="shift-1,team/shift-2"' in lora_series()[0]
    engine.add_adapter("shift-9")
    assert len(lora_series()) == 1
    assert 'running_lora_adapters="shift-1,shift-9,team/shift-2"' in lora_series()[0]


def test_the_room_for_adapters_is_the_configured_one(engine: FakeEngine) -> None:
    with TestClient(create_app(engine, max_adapter_slots=77)) as client:
        assert any('max_lora="77"' in name for name in scrape(client))


def test_the_aliases_can_be_turned_off(engine: FakeEngine) -> None:
    with TestClient(create_app(engine, ServerConfig(vllm_metrics=False))) as client:
        assert not any(name.startswith("vllm:") for name in scrape(client))


def test_names_of_clients_making_do_not_become_series(
    client: TestClient, engine: FakeEngine
) -> None:
    def count() -> int:
        return sum(not name.startswith("vllm:") for name in scrape(client))

    for index in range(MAX_ADAPTER_LABELS + 40):
        engine.add_adapter(f"tenant-{index}")
        body = {"prompt": "a", "model": f"tenant-{index}", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200
    adapters = [name for name in scrape(client) if name.startswith("sloraj:adapter_requests_total")]
    assert len(adapters) == MAX_ADAPTER_LABELS + 1
    assert any('adapter="other"' in name for name in adapters)

    def ask_for_nonsense(which: str) -> int:
        for index in range(25):
            body = {"prompt": "a", "model": f"unknown-{which}-{index}"}
            client.post("/v1/completions", json=body)
            client.get(f"/no/such/path/{which}-{index}")
            client.request(f"VERB{which}{index}", "/health")
        return count()

    assert ask_for_nonsense("a") == ask_for_nonsense("b")
    text = client.get("/metrics").text
    assert "unknown-" not in text and "no/such" not in text and not re.search("VERB", text)


def test_the_scrape_answers_when_the_engine_is_dead(client: TestClient, engine: FakeEngine) -> None:
    engine.die("gone")
    assert scrape(client)['sloraj:engine_state{state="dead"}'] == 1


def test_the_queue_has_the_same_series_however_many_tenants(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for num_tenants in (1, 300):
        driver = CoreDriver(queue=QueueConfig(queue_order="vtc", cluster_adapters=2))
        for number in range(num_tenants):
            driver.generate([1], tenant=f"tenant {number}")
        driver.step()
        stats: concurrent.futures.Future[Any] = concurrent.futures.Future()
        stats.set_result(driver.core.stats())
        monkeypatch.setattr(engine, "stats", lambda stats=stats: stats)
        series = scrape(client)
        assert series["sloraj:engine_queue_tenants"] == num_tenants
        names.append({name for name in series if name.startswith("sloraj:engine_queue_")})
    assert names[0] == names[1] and len(names[0]) == 8
