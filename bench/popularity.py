"""Which adapters a trace asks for: the paper's power law, or Zipf's; and whose they are."""

from __future__ import annotations

import dataclasses

import numpy as np

from bench.trace import Request, Trace, default_tenant


def draw_adapters(
    rng: np.random.RandomState, num: int, num_adapters: int, *, alpha: float, zipf: float | None
) -> np.ndarray:
    """Adapter indices, int64 [num], by the paper's power law, or by Zipf's if `zipf` is given."""
    if zipf is None:
        drawn = (rng.power(alpha, num) * num_adapters).astype(np.int64)
        return np.minimum(drawn, num_adapters - 1)  # X rounds up to 1 once in a long while
    cumulative = np.cumsum(np.arange(1, num_adapters + 1, dtype=np.float64) ** -zipf)
    drawn = np.searchsorted(cumulative / cumulative[-1], rng.random_sample(num), side="right")
    return np.minimum(drawn, num_adapters - 1)


def assign_adapters(
    trace: Trace, num_adapters: int, *, alpha: float = 1.0, zipf: float | None = None,
    seed: int = 42, num_tenants: int | None = None,
) -> list[Request]:  # fmt: skip
    """A recorded trace, which knows no adapters, with adapters drawn as `generate` draws them; with
    none, for the base model alone.
    """
    rng = np.random.RandomState(seed)
    drawn: list[int | None] = [None] * len(trace)
    if num_adapters:
        drawn = draw_adapters(rng, len(trace), num_adapters, alpha=alpha, zipf=zipf).tolist()
    return [
        dataclasses.replace(request, adapter=adapter, tenant=tenant_of(adapter, num_tenants))
        for request, adapter in zip(trace, drawn, strict=True)
    ]


def tenant_of(adapter: int | None, num_tenants: int | None) -> str:
    """Whose an adapter is, where tenants share the adapters by number, or None have one each."""
    if adapter is None or num_tenants is None:
        return default_tenant(adapter)
    return f"tenant-{adapter % num_tenants}"
