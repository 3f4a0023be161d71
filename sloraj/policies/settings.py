"""Settings of the queue. Field names are those of `EngineConfig`, so an error names the flag."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sloraj.errors import ConfigError
from sloraj.request import MAX_TENANT_NAME

ORDERS = ("fcfs", "priority", "vtc")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """In which order waiting requests are admitted. What the fields mean is at `EngineConfig`.

    Raises ConfigError naming the field.
    """

    queue_order: str = "fcfs"
    priority_ageing_s: float = 10.0
    tenant_weights: tuple[tuple[str, float], ...] = ()
    tenant_max_waiting: int | None = None
    tenant_tolerance: float = 0.0
    tenant_headroom: float = 0.0
    prompt_token_cost: float = 1.0
    output_token_cost: float = 2.0
    adapter_cost: float = 1.0
    adapter_load_cost: float = 20_000.0
    cluster_adapters: int | None = None
    cluster_max_overtakes: int = 256
    cluster_max_wait_s: float | None = None
    cluster_max_lead: float = 4096.0

    def __post_init__(self) -> None:
        self._require(self.queue_order in ORDERS, "queue_order", f"{', '.join(ORDERS)}")
        for name in ("priority_ageing_s", "prompt_token_cost", "output_token_cost"):
            self._require(_is_finite_above(getattr(self, name), 0.0), name, "above 0")
        for name in ("adapter_cost", "adapter_load_cost", "cluster_max_lead", "tenant_tolerance"):
            value = getattr(self, name)
            self._require(value == 0 or _is_finite_above(value, 0.0), name, "0 and up")
        for name in ("cluster_adapters", "cluster_max_overtakes", "tenant_max_waiting"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "1 and up")
        wait_s = self.cluster_max_wait_s
        self._require(
            wait_s is None or _is_finite_above(wait_s, 0.0), "cluster_max_wait_s", "above 0"
        )
        headroom = self.tenant_headroom
        self._require(0 <= headroom < 1, "tenant_headroom", "0 and up, below 1")
        self._check_weights()
        for name in ("tenant_weights", "tenant_max_waiting"):
            is_heeded = self.queue_order == "vtc" or not getattr(self, name)
            self._require(is_heeded, name, "none, unless queue_order is vtc")

    def _check_weights(self) -> None:
        is_pairs = isinstance(self.tenant_weights, tuple | list) and all(
            isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
            for pair in self.tenant_weights
        )
        self._require(is_pairs, "tenant_weights", "pairs of a name and a weight")
        names = [name for name, _ in self.tenant_weights]
        for name, weight in self.tenant_weights:
            self._require(
                0 < len(name) <= MAX_TENANT_NAME and names.count(name) == 1, "tenant_weights",
                f"names of 1 to {MAX_TENANT_NAME} characters, each once", name,
            )  # fmt: skip
            self._require(
                isinstance(weight, int | float) and _is_finite_above(weight, 0.0),
                "tenant_weights", "weights above 0", f"{name}={weight}",
            )  # fmt: skip

    def _require(self, holds: bool, name: str, allowed: str, got: Any = None) -> None:
        if not holds:
            got = getattr(self, name) if got is None else got
            raise ConfigError(f"{name}: got {got!r}, allowed: {allowed}", param=name)


def _is_finite_above(value: float, low: float) -> bool:
    return math.isfinite(value) and value > low
