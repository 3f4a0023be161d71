"""What a point makes of an engine that has started: pool, policies, requests. It needs no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench.points import Point
from bench.simulator.geometry import weight_bytes
from bench.trace import Request
from checkpoints.model_config import ModelConfig
from sloraj.config import EngineConfig, SchedulerConfig

WORKSPACE_BYTES = 2_500_000_000  # of a capped total, what is neither weights nor pool


def capped_pool_bytes(config: ModelConfig, total_gb: float) -> int:
    """What a device of so many GB leaves for the pool. Raises ValueError if that is nothing."""
    left = int(total_gb * 1e9) - weight_bytes(config) - WORKSPACE_BYTES
    if left <= 0:
        raise ValueError(
            f"{total_gb:g} GB: got {weight_bytes(config) / 1e9:.1f} GB of weights and "
            f"{WORKSPACE_BYTES / 1e9:.1f} GB of workspace, allowed: less than the total"
        )
    return left


def core_config(
    config: SchedulerConfig, engine: EngineConfig, point: Point, num_pages: int
) -> SchedulerConfig:
    """Of a point's core on so many pages. Raises ValueError: see `with_policies`."""
    changed = with_policies(config, engine, dict(point.policies))
    changed = dataclasses.replace(changed, num_pages=num_pages)
    if point.adapter_share is None:
        return changed
    share = int(point.adapter_share * (num_pages - 1))
    return dataclasses.replace(changed, num_adapter_pages=share)


def with_policies(
    config: SchedulerConfig, engine: EngineConfig, changes: Mapping[str, Any]
) -> SchedulerConfig:
    """The scheduler's configuration after these fields of EngineConfig have changed.

    Raises ValueError: a change that the scheduler's side never sees, or no field's name.
    """
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    for name in changes:
        if name not in known:
            raise ValueError(f"policies: got {name!r}, allowed: a field of EngineConfig")
    changed = dataclasses.replace(engine, **changes)
    seen = {
        field.name: getattr(changed, field.name)
        for field in dataclasses.fields(SchedulerConfig)
        if hasattr(changed, field.name)
        and getattr(changed, field.name) != getattr(engine, field.name)
    }
    if changed != engine and not seen:
        raise ValueError(
            f"policies: got {sorted(changes)}, allowed: fields that the scheduler sees"
        )
    return dataclasses.replace(config, **seen)


def generate_fields(point: Point, index: int, request: Request) -> dict[str, Any]:
    """What `Generate` says of a request beyond its tokens and adapter: whose it is, and how urgent.

    The lower a priority, the earlier its turn: newest first is one lower for each request.
    """
    return {"tenant": request.tenant, "priority": -index if point.newest_first else 0}
