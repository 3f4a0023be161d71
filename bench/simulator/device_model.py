"""A fitted model of one device, engine and host: what a step costs, as data in a JSON file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

from bench.simulator.cost import Cost

KIND = "simulator-model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """How long the parts of a step take.

    device: from the end of the step before to the step's own end, its installs included. execute:
    of the host, in `Runner.execute`. between: of the host, from the return of one `collect` to the
    next `execute`: update, emit, messages, schedule. The bus carries adapters beside the device.
    A device with nothing to do begins a step `head_start_s` before `execute` returns.
    """

    device: Cost
    execute: Cost
    between: Cost
    bus_bytes_per_s: float
    bus_latency_s: float
    head_start_s: float = 0.0
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)  # device, commit, runs, errors

    def travel_s(self, num_bytes: int) -> float:
        """Of copies that leave together: what they wait before the first byte, they wait once."""
        return self.bus_latency_s + num_bytes / self.bus_bytes_per_s if num_bytes else 0.0

    def scaled(self, factor: float) -> Self:
        """A device whose steps take `factor` times as long."""
        found = {name: value * factor for name, value in self.device.coefficients.items()}
        return dataclasses.replace(self, device=Cost(found))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            **self.origin,
            "bus_bytes_per_s": self.bus_bytes_per_s,
            "bus_latency_s": self.bus_latency_s,
            "head_start_s": self.head_start_s,
            "seconds": {
                name: getattr(self, name).coefficients for name in ("device", "execute", "between")
            },
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError if the file holds no model."""
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise ValueError(f'{path}: no model, allowed: a file with "kind": "{KIND}"')
        return cls.of(found)

    @classmethod
    def of(cls, found: dict[str, Any]) -> Self:
        numbers = ("bus_bytes_per_s", "bus_latency_s", "head_start_s")
        costs = {name: Cost(coefficients) for name, coefficients in found["seconds"].items()}
        given: dict[str, Any] = costs | {name: found[name] for name in numbers}
        apart = ("kind", "seconds", *numbers)
        origin = {key: value for key, value in found.items() if key not in apart}
        return cls(**given, origin=origin)


def constant(step_s: float, *, bus_bytes_per_s: float = float("inf")) -> DeviceModel:
    """A device whose every step takes `step_s`, with a host that takes no time."""
    return DeviceModel(
        device=Cost({"step": step_s}), execute=Cost({}), between=Cost({}),
        bus_bytes_per_s=bus_bytes_per_s, bus_latency_s=0.0, origin={"device": "imaginary"},
    )  # fmt: skip
