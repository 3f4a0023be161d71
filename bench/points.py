"""One point of a figure: which engine, which pool, which adapters, which traffic. Data.

Points of one `EngineSpec` share one start of the engine (weights, compiled programs). All else is
the host's to decide and costs no start: how many pages of the device's pool a core is given,
whether adapters and KV share them, what the ranks are padded to, and the policies.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from bench.settings import LENGTHS, MODULES

BATCHED_TOKENS = 2048  # of a step, usually
NOT_IN_KEY = ("figure", "engine", "base_requests")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine is started with."""

    geometry: str
    kernels: str | None = None
    merged_rank: int | None = None  # an adapter of this rank is added into the base's weights
    max_num_seqs: int = 256
    max_num_batched_tokens: int = BATCHED_TOKENS
    max_rank: int = 64
    max_adapter_slots: int = 2048
    max_model_len: int = 1024
    pool_bytes: int | None = None  # None: all that is left

    @property
    def name(self) -> str:
        """For files and logs: what differs from the usual."""
        merged = "" if self.merged_rank is None else f"merged{self.merged_rank}"
        tokens = self.max_num_batched_tokens
        steps = "" if tokens == BATCHED_TOKENS else f"{tokens}tokens"
        words = (self.geometry, self.kernels or "", merged, steps)
        return "-".join(word for word in words if word)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run. Exactly one of `num_requests` (all at once: saturation), `load` and `rate`."""

    figure: str  # of `bench.figures`
    engine: EngineSpec
    system: str = "sloraj"  # the line that it belongs to
    setting: str = "S1"  # of `bench.settings`: the ranks
    modules: tuple[str, ...] = MODULES
    num_adapters: int = 0  # registered; 0: the base model alone
    pool_gb: float | None = None  # of device memory for weights, workspace and pool; None: all
    pool_pages: int | None = None  # the pool outright, in place of that
    num_requests: int | None = None
    base_requests: int = 768  # of the base's own saturated run, which goes before
    load: float | None = None  # offered rate in parts of the base's saturated one, same pool
    rate: float | None = None  # requests per second
    duration_s: float = 60.0
    alpha: float = 1.0
    cv: float = 1.0
    input_range: tuple[int, int] = LENGTHS
    output_range: tuple[int, int] = LENGTHS
    flood: float | None = None  # requests of one tenant more, in times a tenant's mean rate
    num_tenants: int | None = None
    adapter_share: float | None = None  # of the pool, for adapters alone; None: it is shared
    pad_ranks: bool = False
    policies: tuple[tuple[str, Any], ...] = ()  # fields of SchedulerConfig, by name
    newest_first: bool = False  # priorities by arrival: LIFO
    give_up_s: float = 180.0
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises ValueError: what, got, allowed."""
        given = [x for x in (self.num_requests, self.load, self.rate) if x is not None]
        if len(given) != 1:
            raise ValueError(
                f"{self.figure}: got num_requests {self.num_requests}, load {self.load}, rate "
                f"{self.rate}, allowed: exactly one of them"
            )

    @property
    def is_saturated(self) -> bool:
        return self.num_requests is not None

    @property
    def pool(self) -> str:
        """As results name it."""
        if self.pool_pages is not None:
            return f"{self.pool_pages} pages"
        return "full" if self.pool_gb is None else f"{self.pool_gb:g} GB"

    def record(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found | {"policies": dict(self.policies), "pool": self.pool}

    @classmethod
    def of(cls, found: dict[str, Any]) -> Point:
        """What `record` wrote. Raises TypeError if it is of something else."""
        given = {name: _tuples(value) for name, value in found.items() if name != "pool"}
        given["engine"] = EngineSpec(**found["engine"])
        given["policies"] = tuple((k, _tuples(v)) for k, v in found["policies"].items())
        return cls(**given)

    @property
    def key(self) -> str:
        """Names exactly this point: its record is found by it when a run is resumed."""
        default = Point(figure=self.figure, engine=self.engine, num_requests=1)
        words = [self.engine.name, self.figure]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in NOT_IN_KEY and value != getattr(default, field.name):
                words.append(f"{field.name}={value}")
        return " ".join(words)


def _tuples(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
