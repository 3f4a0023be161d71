"""The paper's grid on an H200, as shards: lists of points that one command runs in nine minutes.

Figures are named as `bench.report` draws them. Every shard measures the base itself, on the pools
that it uses, so that shards can run on different days and still be compared point by point.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.points import EngineSpec, Point
from bench.settings import ALPHAS, CVS, SLO_S

B7 = EngineSpec(geometry="llama-7b")
B7_SHORT_STEPS = dataclasses.replace(B7, max_num_batched_tokens=1024)
B8 = EngineSpec(geometry="llama-3.1-8b", max_rank=8, max_adapter_slots=10_000)
B13 = EngineSpec(geometry="llama-13b")
QV = ("q_proj", "v_proj")
AT_ONCE = 768  # requests of a saturated point on a full pool: three times the rows
CAPPED = {24: 256, 40: 512, 80: 768}  # and on a pool of so many GB, which holds fewer
FAIR = (("queue_order", "vtc"),)
TOLERANT = (*FAIR, ("tenant_tolerance", 8000.0))  # some six requests of service
NEWEST = (("queue_order", "priority"), ("priority_ageing_s", 1e9))

# What is turned off or replaced, one at a time; each line of an ablation is one of them.
ABLATIONS: dict[str, dict[str, Any]] = {
    "sloraj": {},
    "no-unify-mem": {"adapter_share": 0.5},
    "no-unify-mem, a quarter": {"adapter_share": 0.25},
    "padded ranks": {"pad_ranks": True},
    "clustered, d = 8": {"policies": (("cluster_adapters", 8),)},
}


def _many(base: dict[str, Any], *changes: dict[str, Any]) -> list[Point]:
    return [Point(**(base | change)) for change in changes]


def retention(
    engine: EngineSpec, setting: str, counts: tuple[int, ...], **more: Any
) -> list[Point]:
    """Saturated throughput by the number of adapters, beside the base's."""
    base: dict[str, Any] = {
        "figure": "num-adapters", "engine": engine, "setting": setting, "num_requests": AT_ONCE,
    } | more  # fmt: skip
    base["base_requests"] = base["num_requests"]  # so that both drain alike
    return _many(base, *({"num_adapters": count} for count in counts))


def ablation(gb: int, setting: str, count: int, systems: tuple[str, ...]) -> list[Point]:
    """Unified paging and exact ranks, on a pool as one of the paper's GPUs had."""
    base: dict[str, Any] = {
        "figure": "ablation", "engine": B7, "setting": setting, "num_adapters": count,
        "pool_gb": float(gb), "num_requests": CAPPED[gb], "base_requests": CAPPED[gb],
    }  # fmt: skip
    return _many(base, *(ABLATIONS[system] | {"system": system} for system in systems))


def bmm(gb: int, setting: str, counts: tuple[int, ...]) -> list[Point]:
    """The paper's batched products; few requests, for it is slow."""
    engine = dataclasses.replace(B7, kernels="bmm", pool_bytes=int(gb * 1e9) - 14_000_000_000)
    base: dict[str, Any] = {
        "figure": "ablation", "engine": engine, "setting": setting, "system": "bmm",
        "pool_gb": float(gb), "num_requests": 128, "give_up_s": 60.0,
    }  # fmt: skip
    return _many(base, *({"num_adapters": count} for count in counts))


def loads(figure: str, policies: dict[str, dict[str, Any]], **more: Any) -> list[Point]:
    """Every one of `points` under every policy, on S2 with 200 adapters and 24 GB unless `more`
    says else.
    """
    base: dict[str, Any] = {
        "figure": figure, "engine": B7, "setting": "S2", "num_adapters": 200, "pool_gb": 24.0,
        "duration_s": 40.0, "base_requests": CAPPED[24],
    }  # fmt: skip
    points = more.pop("points")
    return [
        Point(**(base | more | point | change | {"system": name}))
        for point in points
        for name, change in policies.items()
    ]


def flood(policies: dict[str, dict[str, Any]], **more: Any) -> list[Point]:
    """Twenty tenants, and the same with one more that floods, on the full pool."""
    return loads(
        "fairness", policies, num_adapters=20, duration_s=25.0, pool_gb=None, base_requests=AT_ONCE,
        points=[{"load": 0.6}, {"load": 0.6, "flood": 20.0}], **more,
    )  # fmt: skip


OURS: dict[str, dict[str, Any]] = {"sloraj": {}}
KEPT_FREE = "vtc, a fifth kept free"
CLUSTERS = {f"d = {d}": {"policies": (("cluster_adapters", d),)} for d in (1, 2, 4, 8, 32)}
FAIRNESS: dict[str, dict[str, Any]] = {
    "first come": {},
    "vtc": {"policies": FAIR},
    KEPT_FREE: {"policies": (*FAIR, ("tenant_headroom", 0.2))},
}

ABORTS: dict[str, dict[str, Any]] = {  # who is served when not all can be
    "sloraj": {"policies": (*TOLERANT, ("early_abort", "largest"), ("first_token_slo_s", SLO_S))},
    "strictly fair": {"policies": (*FAIR, ("early_abort", "model"), ("first_token_slo_s", SLO_S))},
    "first come": {},
    "newest first": {"policies": NEWEST, "newest_first": True},
    "the paper's": {"policies": (("early_abort", "paper"), ("first_token_slo_s", SLO_S))},
}
ABORTS_1S: dict[str, dict[str, Any]] = {  # the same for an objective of 1 s
    f"{name}, for 1 s": {"policies": tuple({**dict(kept), "first_token_slo_s": 1.0}.items())}
    for name in ("sloraj", "the paper's")
    for kept in [ABORTS[name]["policies"]]
}
POLICIES: dict[str, dict[str, Any]] = {  # one taken away or replaced at a time
    "sloraj": {},
    "no prefetch": {"policies": (("prefetch", False),)},
    "retention: lru": {"policies": (("retention", "lru"),)},
    "retention: the paper's": {"policies": (("retention", "paper"),)},
    "all four on": {
        "policies": (
            *TOLERANT, ("cluster_adapters", 32), ("early_abort", "largest"),
            ("first_token_slo_s", SLO_S),
        ),
    },
}  # fmt: skip

SHARDS: dict[str, list[Point]] = {
    "core-7b": [
        *retention(B7, "S2", (200,)),
        *retention(B7, "S1", (200,)),
        *ablation(24, "S2", 200, ("sloraj", "no-unify-mem")),
    ],
    "retention-7b": [*retention(B7, "S1", (1000, 2000)), *retention(B7, "S2", (1000,))],
    "capped-7b": [
        *ablation(40, "S2", 200, ("sloraj", "no-unify-mem", "no-unify-mem, a quarter")),
        *ablation(24, "S2", 200, ("no-unify-mem, a quarter", "padded ranks")),
        *ablation(40, "S2", 200, ("padded ranks",)),
    ],
    "abort": loads(
        "abort", ABORTS, duration_s=25.0, points=[{"load": load} for load in (1.3, 0.9)]
    ),
    "policies": loads(
        "policies", POLICIES, duration_s=30.0, points=[{"load": 0.7, "alpha": 0.6}]
    ),
    "policies-short": loads(
        "policies-short", {name: kept for name, kept in POLICIES.items() if name != "all four on"},
        duration_s=15.0, input_range=(8, 128), output_range=(8, 32), base_requests=1500,
        points=[{"load": 0.6, "num_adapters": 100}, {"load": 0.6, "alpha": 0.6}],
    ),
    "fairness": flood(FAIRNESS),
    "fairness-short-steps": flood(
        {f"{KEPT_FREE}, 1,024 tokens a step": FAIRNESS[KEPT_FREE]}, engine=B7_SHORT_STEPS
    ),
    "clustered": [
        point for gb in (24, 40) for point in ablation(gb, "S2", 200, ("clustered, d = 8",))
    ],
    "retention-8b": retention(B8, "S1", (200, 10_000), modules=QV),
    "retention-7b-few": [
        *retention(B7, "S1", (1, 5, 20, 100)),
        *retention(B7, "S2", (1, 5, 20, 100)),
    ],
    "table-3": [
        *retention(B7, "S1", (5, 100, 1000, 2000), figure="table-3", pool_gb=80.0),
        *retention(B7, "S2", (5, 100, 1000), figure="table-3", pool_gb=80.0),
    ],
    "table-3-13b": retention(
        B13, "S4", (2, 100, 400), figure="table-3", pool_gb=80.0, num_requests=512
    ),
    "capped-counts": [
        point
        for count in (20, 50, 100)
        for point in ablation(24, "S2", count, ("sloraj", "no-unify-mem"))
    ],
    "bmm": bmm(40, "S2", (20, 200)),
    "merged": [
        Point(
            figure="merged", engine=dataclasses.replace(B7, merged_rank=64), system="merged",
            num_requests=512, base_requests=512,
        ),
        *retention(B7, "S2", (1,), figure="merged", num_requests=512),
    ],
    "rate": loads(
        "rate", OURS, points=[{"load": load} for load in (0.25, 0.5, 0.75, 0.9, 1.0, 1.25)]
    ),
    "alpha": loads("alpha", OURS, points=[{"load": 0.8, "alpha": alpha} for alpha in ALPHAS]),
    "cv": loads("cv", OURS, points=[{"load": 0.8, "cv": cv} for cv in CVS]),
    "clusters": loads(
        "clusters", CLUSTERS, num_adapters=32, pool_gb=40.0, duration_s=30.0,
        points=[{"load": 0.9, "alpha": alpha} for alpha in (0.1, 1.0)],
    ),
    "abort-more": loads(
        "abort", ABORTS, duration_s=25.0, points=[{"load": load} for load in (1.1, 1.5)]
    ),
    "abort-1s": loads(
        "abort", ABORTS_1S, duration_s=25.0, points=[{"load": x} for x in (1.3, 0.9, 1.1, 1.5)]
    ),
    "ranks": [
        point
        for name in ("S1", "S3", "S5", "S7")  # of ranks 8, 16, 32, 64
        for point in retention(B7, name, (200,), figure="ranks")
    ],
}  # fmt: skip
"""In order of value: the first ones say most."""

TINY = EngineSpec(
    geometry="demo", max_num_seqs=4, max_num_batched_tokens=32, max_rank=16, max_adapter_slots=32,
    max_model_len=128,
)  # fmt: skip
_QUICK: dict[str, Any] = {
    "engine": TINY, "setting": "S1", "pool_pages": 160, "input_range": (4, 32),
    "output_range": (4, 24), "seed": 1, "base_requests": 24,
}  # fmt: skip
QUICK: list[Point] = [
    *_many(
        _QUICK | {"num_requests": 24},
        {"figure": "num-adapters", "num_adapters": 4},
        {"figure": "num-adapters", "num_adapters": 16},
        {"figure": "ablation", "num_adapters": 16},
        {
            "figure": "ablation",
            "num_adapters": 16,
            "system": "no-unify-mem",
            "adapter_share": 0.5,
        },
        {"figure": "ablation", "num_adapters": 16, "system": "padded ranks", "pad_ranks": True},
    ),
    *_many(
        _QUICK | {"num_adapters": 8, "duration_s": 1.0},
        *({"figure": "rate", "load": load} for load in (0.5, 1.2)),
        {"figure": "alpha", "load": 0.8, "alpha": 0.1},
        *(
            {"figure": "abort", "load": 1.3, "system": name} | ABORTS[name]
            for name in ("sloraj", "the paper's")
        ),
        {"figure": "cv", "load": 0.8, "cv": 4.0},
        *({"figure": "clusters", "load": 0.8, "system": "d = 2"} | CLUSTERS["d = 2"],),
        *(
            {"figure": "fairness", "load": 0.6, "flood": 5.0, "system": name} | FAIRNESS[name]
            for name in FAIRNESS
        ),
    ),
]
"""The same machinery on a CPU, in a minute or two: that the sweeps work, and nothing else."""
