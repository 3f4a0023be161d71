"""Prometheus metrics under `sloraj:`, and the five `vllm:` names that routers already read.

Labels are bounded: adapters by name are only in the one router series, which lists at most as
many as fit on the device; counters by adapter keep the first `MAX_ADAPTER_LABELS` names and
count the rest as "other".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from serving.replies import Usage
from sloraj.frontend_api import AdapterInfo, EngineHealth, ModelInfo

MAX_ADAPTER_LABELS = 64
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class EngineSnapshot:
    """What the engine said last, as gauges: one series each, replaced as a whole at each scrape."""

    def __init__(self, *, vllm_names: bool, max_adapter_slots: int | None) -> None:
        self._vllm_names = vllm_names
        self._max_adapter_slots = max_adapter_slots or 0
        self.health = EngineHealth(state="starting", heartbeat_age_s=0.0)
        self.info: ModelInfo | None = None
        self.stats: dict[str, Any] = {}
        self.adapters: list[AdapterInfo] = []

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily(
            "sloraj:engine_state", "1 for the state the engine is in", labels=["state"]
        )
        for state in ("starting", "ready", "draining", "dead"):
            up.add_metric([state], float(state == self.health.state))
        yield up
        yield _gauge("sloraj:engine_heartbeat_age_seconds", self.health.heartbeat_age_s)
        yield _gauge("sloraj:adapters_registered", len(self.adapters))
        yield _gauge("sloraj:adapters_on_device", len(self._on_device()))
        for name, value in _numbers(self.stats):
            yield _gauge(f"sloraj:engine_{name}", value)
        if self._vllm_names and self.info is not None:
            yield from self._vllm(self.info)

    def _on_device(self) -> list[str]:
        return [info.adapter_id for info in self.adapters if info.state == "on_device"]

    def _stat(self, name: str) -> float:
        return float(self.stats.get(name, 0))

    def _vllm(self, info: ModelInfo) -> Iterable[Metric]:
        labels, values = ["model_name", "engine"], [info.model_id, "0"]
        num_pages = self._stat("num_pages")
        used = 1 - self._stat("num_pages_free") / num_pages if num_pages else 0.0
        for name, value in (
            ("vllm:num_requests_running", self._stat("num_running")),
            ("vllm:num_requests_waiting", self._stat("num_waiting")),
            ("vllm:kv_cache_usage_perc", used),
        ):
            family = GaugeMetricFamily(name, "as vLLM names it", labels=labels)
            family.add_metric(values, value)
            yield family
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "page size and count",
            labels=["block_size", "num_gpu_blocks", "engine"],
        )
        cache.add_metric([str(info.page_size), str(info.num_pages), "0"], 1.0)
        yield cache
        yield self._lora_info()

    def _lora_info(self) -> Metric:
        """Routers take this as residency: who is on the device, and how many more would fit."""
        on_device = self._on_device()
        most = max(self._max_adapter_slots, len(on_device), 1)
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "adapters on the device",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )  # fmt: skip
        family.add_metric([str(most), "", ",".join(on_device)], time.time())
        return family


def _numbers(stats: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Every number in `stats`, those of nested objects under `outer_inner`."""
    for name, value in stats.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and name.isidentifier():
            yield f"{prefix}{name}", float(value)


def _gauge(name: str, value: float) -> Metric:
    return GaugeMetricFamily(name, name.partition(":")[2].replace("_", " "), value=float(value))


class Metrics:
    """Counts what the server does. Everything here is called on the event loop, except `render`."""

    def __init__(self, *, vllm_names: bool = True, max_adapter_slots: int | None = None) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineSnapshot(vllm_names=vllm_names, max_adapter_slots=max_adapter_slots)
        self.registry.register(self.engine)
        self._adapter_labels: set[str] = set()
        self._lock = threading.Lock()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=self.registry, buckets=_LATENCY_S)

        self._http = counter("sloraj:http_requests", "HTTP requests", "handler", "method", "status")
        self._http_s = histogram(
            "sloraj:http_request_duration_seconds", "seconds to the last byte", "handler"
        )
        self._choices = counter("sloraj:choices", "finished choices", "reason")
        self._requests = counter("sloraj:adapter_requests", "requests by adapter", "adapter")
        self._prompt = counter("sloraj:prompt_tokens", "prompt tokens")
        self._output = counter("sloraj:generation_tokens", "generated tokens")
        self._ttft_s = histogram("sloraj:time_to_first_token_seconds", "arrival to first token")
        self._e2e_s = histogram("sloraj:e2e_request_latency_seconds", "arrival to last token")

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        method = (
            method if method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT") else "other"
        )
        self._http.labels(handler, method, str(status)).inc()
        self._http_s.labels(handler).observe(seconds)

    def first_token(self, arrival_s: float) -> None:
        self._ttft_s.observe(time.monotonic() - arrival_s)

    def finished(
        self, adapter_id: str | None, reasons: list[str], usage: Usage, seconds: float
    ) -> None:
        for reason in reasons:
            self._choices.labels(reason).inc()
        if usage.completion_tokens:  # it ran, so the adapter's name is a real one
            self._requests.labels(self._adapter_label(adapter_id)).inc()
        self._prompt.inc(usage.prompt_tokens)
        self._output.inc(usage.completion_tokens)
        if "abort" not in reasons:
            self._e2e_s.observe(seconds)

    def _adapter_label(self, adapter_id: str | None) -> str:
        if adapter_id is None:
            return "base"
        if adapter_id not in self._adapter_labels:
            if len(self._adapter_labels) >= MAX_ADAPTER_LABELS:
                return "other"
            self._adapter_labels.add(adapter_id)
        return adapter_id

    def render(self) -> bytes:
        with self._lock:
            text: bytes = generate_latest(self.registry)
            return text
