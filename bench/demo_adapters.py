"""Which adapter has which rank, scaling and target modules.

As mixed as users' adapters are, within a few megabytes. Small ranks suffice for every task: the
base already knows how, an adapter only selects.
"""

from __future__ import annotations

import dataclasses

from bench.demo_model import AdapterShape
from checkpoints.demo.tasks import TASKS
from checkpoints.model_config import TARGET_MODULES

_QV = ("q_proj", "v_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter's shape, and how its config spells the target modules.

    The spelling (a list of names, a regular expression, "all-linear") selects `shape.modules`.
    """

    shape: AdapterShape
    target_modules: tuple[str, ...] | str


def _plan(
    rank: int,
    alpha: float,
    modules: tuple[str, ...],
    *,
    spelled: str | None = None,
    layers: tuple[int, ...] | None = None,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
) -> AdapterPlan:
    shape = AdapterShape(
        rank=rank,
        alpha=alpha,
        modules=modules,
        layers=layers,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern or {},
    )
    return AdapterPlan(shape, spelled or modules)


PLANS: dict[str, AdapterPlan] = {
    "shift-1": _plan(8, 16, _QV),
    "shift-2": _plan(4, 8, TARGET_MODULES),
    "shift-3": _plan(8, 16, _ATTENTION),
    "shift-4": _plan(16, 32, _QV),
    "shift-5": _plan(4, 8, _QV),
    "shift-6": _plan(6, 12, _ATTENTION),
    "shift-7": _plan(64, 64, _QV, layers=(0, 1)),
    "shift-8": _plan(12, 24, _QV),
    "shift-10": _plan(16, 16, _QV, use_rslora=True),
    "shift-12": _plan(4, 16, _ATTENTION),
    "shift-13": _plan(8, 8, TARGET_MODULES, spelled="all-linear"),
    "shift-17": _plan(32, 32, ("v_proj",)),
    "shift-20": _plan(8, 32, _QV),
    "shift-25": _plan(4, 4, TARGET_MODULES),
    "atbash": _plan(12, 12, _ATTENTION),
    "upper": _plan(4, 8, _QV),
    "lower": _plan(8, 16, _QV),
    "swapcase": _plan(16, 32, ("v_proj", "o_proj")),
    "title": _plan(8, 16, _MLP),
    "pascal": _plan(4, 8, TARGET_MODULES),
    "snake": _plan(24, 48, ("v_proj",)),
    "kebab": _plan(6, 6, _QV),
    "join": _plan(12, 24, ("k_proj", "v_proj")),
    "exclaim": _plan(6, 12, _MLP, spelled=r".*\.mlp\.(gate|up|down)_proj"),
    "quote": _plan(64, 16, ("v_proj",), use_rslora=True),
    "brackets": _plan(8, 16, _QV),
    "star-vowels": _plan(4, 8, _MLP),
    "drop-vowels": _plan(4, 8, _ATTENTION, rank_pattern={"v_proj": 16, "q_proj": 6}),
    "hash-digits": _plan(16, 16, ("down_proj",)),
    "mask": _plan(8, 16, _QV),
    "leet": _plan(6, 12, _QV),
    "double": _plan(24, 24, ("q_proj", "k_proj", "v_proj")),
    "spell": _plan(4, 8, _ATTENTION),
    "initials": _plan(32, 64, _QV, layers=(0, 1, 2)),
    "first-word": _plan(6, 12, _ATTENTION),
    "last-word": _plan(4, 8, _QV),
    "stutter": _plan(8, 16, _ATTENTION),
    "reverse": _plan(6, 12, TARGET_MODULES),
    "reverse-words": _plan(16, 32, _QV),
}

if set(PLANS) != set(TASKS):
    raise RuntimeError(f"tasks and adapter plans differ: {set(PLANS) ^ set(TASKS)}")
