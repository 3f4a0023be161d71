"""What each retention policy reloads, on traces of adapter uses: no device, a second a trace.

    python -m bench.retention
    python -m bench.retention --adapters 200 --alpha 0.3 --pages 400 1200

Drives the engine's own `Residency` with ranks 64, 32, 16 and 8 in turn (the paper's S2, 16, 8, 4
and 2 pages of 8 MiB), each use held while the next `--running` uses come, and prints the share of
uses that had to load, and of bytes that were loaded, once the first fifth of the trace has passed.
`lfu` never forgets a use. `furthest` next use first knows the trace: what no policy can do.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from bench.popularity import draw_adapters
from sloraj.adapters.host_store import AdapterVersion
from sloraj.adapters.residency import Residency
from sloraj.adapters.retention import RETENTION_POLICIES, ExpectedReloadCost, RetentionPolicy
from sloraj.batch import PackedAdapter
from sloraj.pages import PagePool

PAGE_BYTES = 8 << 20  # Llama-7B, 16 tokens, bfloat16
RANKS = (64, 32, 16, 8)
POLICIES: dict[str, Callable[[], RetentionPolicy]] = {
    **RETENTION_POLICIES,
    "lfu": lambda: ExpectedReloadCost(decay_uses=math.inf, decay_s=math.inf, fixed_bytes=0),
}
WARM_UP = 0.2  # of a trace, not counted
Shares = tuple[float, float]  # of uses and of bytes


def num_pages_of(adapter: int) -> int:
    return RANKS[adapter % len(RANKS)] // 4


def draw_trace(
    num_uses: int, num_adapters: int, *, alpha: float = 1.0, zipf: float | None = None,
    num_shifts: int = 0, seed: int = 42,
) -> list[int]:  # fmt: skip
    """Adapters as they are used. Popularity is dealt out anew `num_shifts` times on the way."""
    rng = np.random.RandomState(seed)
    drawn = draw_adapters(rng, num_uses, num_adapters, alpha=alpha, zipf=zipf)
    deals = [rng.permutation(num_adapters) for _ in range(num_shifts + 1)]
    deal = np.arange(num_uses) * (num_shifts + 1) // num_uses
    return [int(deals[d][adapter]) for d, adapter in zip(deal, drawn, strict=True)]


def replay(
    trace: Sequence[int], policy: str, num_pages: int, *, rate: float = 20.0, num_running: int = 32
) -> Shares:
    """What the engine's residency loads under a policy. `rate` uses a second; each is held until
    `num_running` more have come.
    """
    now_s = 0.0
    pool = PagePool(num_pages + 1)
    residency = Residency(pool, num_pages, lambda: now_s, POLICIES[policy]())
    tags = itertools.count(1)
    versions: dict[int, AdapterVersion] = {}
    running: collections.deque[str] = collections.deque()
    loads = _Loads(len(trace))
    for place, adapter in enumerate(trace):
        now_s = place / rate
        if adapter not in versions:
            pages = np.broadcast_to(
                np.zeros(1, np.int8), (num_pages_of(adapter), 1, PAGE_BYTES)
            )  # as large as the real ones, and takes no memory
            packed = PackedAdapter(str(adapter), pages, np.zeros((1, 7, 4), np.int32), 64)
            versions[adapter] = AdapterVersion(packed, next(tags))
        version = versions[adapter]
        while running and (len(running) >= num_running or not residency.fits(version, 0)):
            residency.release(running.popleft())
        _, install = residency.acquire(version)
        running.append(version.version_id)
        loads.use(place, adapter, is_load=install is not None)
    return loads.shares


def least_recently_used(trace: Sequence[int], num_pages: int) -> Shares:
    """By the definition, without the engine's code; nothing is held."""
    held: collections.OrderedDict[int, int] = collections.OrderedDict()
    loads = _Loads(len(trace))
    for place, adapter in enumerate(trace):
        loads.use(place, adapter, is_load=adapter not in held)
        held.pop(adapter, None)
        while sum(held.values()) + num_pages_of(adapter) > num_pages:
            held.popitem(last=False)
        held[adapter] = num_pages_of(adapter)
    return loads.shares


def furthest_next_use_first(trace: Sequence[int], num_pages: int) -> Shares:
    """Belady's rule; nothing is held. The least loads for adapters of one size, and near it for
    several.
    """
    nexts: list[float] = [math.inf] * len(trace)
    seen: dict[int, int] = {}
    for place in range(len(trace) - 1, -1, -1):
        nexts[place] = seen.get(trace[place], math.inf)
        seen[trace[place]] = place
    held: dict[int, float] = {}
    num_free = num_pages
    loads = _Loads(len(trace))
    for place, adapter in enumerate(trace):
        loads.use(place, adapter, is_load=adapter not in held)
        if adapter not in held:
            while num_free < num_pages_of(adapter):
                furthest = max(held, key=held.__getitem__)
                del held[furthest]
                num_free += num_pages_of(furthest)
            num_free -= num_pages_of(adapter)
        held[adapter] = nexts[place]
    return loads.shares


class _Loads:
    def __init__(self, num_uses: int) -> None:
        self._begin = int(WARM_UP * num_uses)
        self._uses = self._loads = self._used_pages = self._loaded_pages = 0

    def use(self, place: int, adapter: int, *, is_load: bool) -> None:
        if place >= self._begin:
            self._uses += 1
            self._used_pages += num_pages_of(adapter)
            self._loads += is_load
            self._loaded_pages += is_load * num_pages_of(adapter)

    @property
    def shares(self) -> Shares:
        return self._loads / self._uses, self._loaded_pages / self._used_pages


def main() -> None:
    args = _parse()
    kinds: list[tuple[str, dict[str, float]]] = [(f"alpha {a:g}", {"alpha": a}) for a in args.alpha]
    kinds += [(f"Zipf {z:g}", {"zipf": z}) for z in args.zipf]
    names = (*POLICIES, "furthest")
    print(f"{'trace':16} {'pages':>6}   " + "   ".join(f"{name:>14}" for name in names))
    print(f"{'':16} {'':>6}   " + "   ".join(f"{'uses    bytes':>14}" for _ in names))
    for (name, kind), num_shifts, num_pages in itertools.product(kinds, (0, 3), args.pages):
        trace = draw_trace(args.uses, args.adapters, num_shifts=num_shifts, **kind)  # type: ignore[arg-type]
        found = [replay(trace, policy, num_pages, rate=args.rate, num_running=args.running)
                 for policy in POLICIES]  # fmt: skip
        found.append(furthest_next_use_first(trace, num_pages))
        title = f"{name}, shifts" if num_shifts else name
        shares = "   ".join(f"{uses:6.3f}  {size:6.3f}" for uses, size in found)
        print(f"{title:16} {num_pages:6}   {shares}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--uses", type=int, default=20_000)
    parser.add_argument("--alpha", type=float, nargs="*", default=[0.3, 1.0], help="the paper's")
    parser.add_argument("--zipf", type=float, nargs="*", default=[0.9, 1.1])
    parser.add_argument("--pages", type=int, nargs="+", default=[600, 1200], help="for adapters")
    parser.add_argument("--rate", type=float, default=20.0, help="uses a second")
    parser.add_argument("--running", type=int, default=32)
    return parser.parse_args()


if __name__ == "__main__":
    main()
