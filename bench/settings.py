"""The settings of the S-LoRA paper as data: which base, which ranks, which traces it was measured
on.

`SETTINGS["S2"].adapter_ranks(200)` are the ranks of 200 adapters, cycled in the order of the
original benchmark, so that adapter 0, the most popular one of a skewed trace, has the first rank.
`SWEEPS` are the points of the paper's figures and tables, `KV_BUDGETS` the pools that it gave them.

Source: arXiv:2311.03285 and the suites of its repository. Lengths there are drawn as NumPy's
`randint` does: the upper end is left out.
"""

from __future__ import annotations

import dataclasses

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")  # that the paper's adapters change
LENGTHS = (8, 512)  # of prompts and of outputs, [from, to)
SLO_S = 6.0  # a first token later than this is worth nothing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A base model and the ranks of its adapters."""

    name: str
    geometry: str  # of `bench.geometries`; where it is not there, the setting is simulated
    ranks: tuple[int, ...]  # adapter i has ranks[i % len(ranks)]
    modules: tuple[str, ...] = MODULES
    is_replayed: bool = False  # measured on a recorded trace, not on a generated one

    def adapter_rank(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]

    def adapter_ranks(self, num_adapters: int) -> list[int]:
        return [self.adapter_rank(adapter) for adapter in range(num_adapters)]


def _llama(name: str, size: str, ranks: tuple[int, ...], is_replayed: bool = False) -> Setting:
    return Setting(name=name, geometry=f"llama-{size}", ranks=ranks, is_replayed=is_replayed)


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        _llama("S1", "7b", (8,)),
        _llama("S2", "7b", (64, 32, 16, 8)),
        _llama("S3", "13b", (16,)),
        _llama("S4", "13b", (64, 32, 16)),
        _llama("S5", "30b", (32,)),  # 16 and 32 on the repository's tensor-parallel branch
        _llama("S6", "70b", (64,)),
        _llama("S7", "30b", (64,)),  # on the tensor-parallel branch only
        _llama("real", "7b", (16, 64), is_replayed=True),  # over a chat trace never published
    )
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Points of one figure or table: every combination of the values. Zero adapters: the base."""

    gpu: str
    setting: str
    num_adapters: tuple[int, ...]
    rates: tuple[float, ...]  # requests per second offered
    alphas: tuple[float, ...] = (1.0,)
    cvs: tuple[float, ...] = (1.0,)
    duration_s: float = 300.0
    clusters: tuple[int | None, ...] = (None,)  # most adapters in a batch; None: no limit


ALPHAS = (0.1, 0.3, 0.6, 1.0)
CVS = (1.0, 2.0, 4.0, 6.0, 8.0)

_A10G, _A100_40, _A100_80 = "A10G", "A100-40GB", "A100-80GB"
_N_A10G = (1, 20, 50, 100, 200)
_N_TABLE = (5, 100, 1000, 2000)
_CLUSTERS = (1, 2, 4, 8, 32)

SWEEPS: dict[str, Sweep] = {
    f"table-3-{setting}": Sweep(
        gpu=_A100_80, setting=setting, num_adapters=counts, rates=(10.0,), duration_s=120.0
    )
    for setting, counts in (("S1", _N_TABLE), ("S2", _N_TABLE), ("S4", (2, 100, 1000)))
} | {
    "a10g-num-adapters-S1": Sweep(gpu=_A10G, setting="S1", num_adapters=_N_A10G, rates=(2.0,)),
    "a10g-num-adapters-S2": Sweep(gpu=_A10G, setting="S2", num_adapters=_N_A10G, rates=(2.0,)),
    "a10g-alpha": Sweep(gpu=_A10G, setting="S2", num_adapters=(200,), rates=(2.0,), alphas=ALPHAS),
    "a10g-cv": Sweep(gpu=_A10G, setting="S2", num_adapters=(200,), rates=(2.0,), cvs=CVS),
    "a10g-rate": Sweep(
        gpu=_A10G, setting="S2", num_adapters=(200,), rates=(1.0, 1.5, 2.0, 2.5)
    ),
    "a10g-memory-S1": Sweep(
        gpu=_A10G, setting="S1", num_adapters=(1, 10, 25, 50, 100, 200), rates=(2.5,)
    ),
    "a10g-memory-S2": Sweep(
        gpu=_A10G, setting="S2", num_adapters=(1, 10, 25, 50, 100, 200), rates=(2.5,)
    ),
    "a10g-real": Sweep(
        gpu=_A10G, setting="real", num_adapters=(), rates=(1.0, 2.0, 3.0, 4.0)
    ),
    "a100-40-num-adapters": Sweep(
        gpu=_A100_40, setting="S4", num_adapters=(0, 1, 20, 50, 100, 200), rates=(2.0,)
    ),
    "a100-80-num-adapters-S2": Sweep(
        gpu=_A100_80, setting="S2", num_adapters=_N_A10G, rates=(10.0,)
    ),
    "a100-80-num-adapters-S4": Sweep(
        gpu=_A100_80, setting="S4", num_adapters=(0, 1, 100, 200, 400), rates=(6.0,)
    ),
    "a100-80-rate": Sweep(
        gpu=_A100_80, setting="S4", num_adapters=(400,), rates=(1.0, 2.0, 4.0, 6.0, 8.0)
    ),
    "a100-80-cv": Sweep(gpu=_A100_80, setting="S4", num_adapters=(400,), rates=(6.0,), cvs=CVS),
    "cluster-alpha-S2": Sweep(
        gpu=_A100_40, setting="S2", num_adapters=(32,), rates=(2.0,), alphas=ALPHAS,
        duration_s=120.0, clusters=_CLUSTERS,
    ),
    "cluster-alpha-S4": Sweep(
        gpu=_A100_40, setting="S4", num_adapters=(32,), rates=(2.0,), alphas=ALPHAS,
        duration_s=120.0, clusters=_CLUSTERS,
    ),
    "cluster-cv-S2": Sweep(
        gpu=_A100_40, setting="S2", num_adapters=(32,), rates=(2.0,), cvs=CVS, duration_s=120.0,
        clusters=_CLUSTERS,
    ),
}  # fmt: skip
"""By the paper's figure or table, with its GPU. For "cluster-cv" the repository's suite and its
result files disagree (the suite has alpha where the results have cv); this is what the results
have."""

KV_BUDGETS: dict[tuple[str, str], int] = {
    (_A10G, "S1"): 14_500,
    (_A10G, "S2"): 14_500,
    (_A100_40, "S4"): 14_000,
    (_A100_80, "S2"): 125_000,
    (_A100_80, "S4"): 65_000,
}
"""Tokens of the paper's pool (KV and adapters together), by GPU and setting; its variants without
unified memory were given fewer, down to half."""
