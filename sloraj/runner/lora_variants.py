"""Which adapted modules a forward program computes: variants, so that a step pays for no others.

A LoRA kernel that finds nothing to do still takes its launch, eight times a layer: a step of base
rows would cost several per cent more than a model without LoRA, and adapters on attention alone
would pay for the MLP's kernels too.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from checkpoints.model_config import TARGET_MODULES

MODULES: dict[str, tuple[int, ...]] = {  # each holds the one before
    "base": (),
    "attention": (0, 1, 2, 3),  # q, k, v, o
    "all": tuple(range(len(TARGET_MODULES))),
}
_NAMES = tuple(MODULES)


class SlotVariants:
    """What each adapter slot needs of a program, of those variants that were compiled; its rank."""

    def __init__(self, compiled: tuple[str, ...]) -> None:
        assert "all" in compiled
        self._compiled = tuple(name for name in _NAMES if name in compiled)
        self._needs: dict[int, int] = {0: 0}  # slot -> place in _NAMES; slot 0 is the base
        self._ranks: dict[int, int] = {0: 0}

    def bind(self, slot: int, segments: np.ndarray) -> None:
        """Slot now holds an adapter with these segments, i32 `[layers, 7, 4]`."""
        present = set(np.flatnonzero(segments[:, :, 0].any(axis=0)).tolist())
        self._needs[slot] = next(
            i for i, name in enumerate(_NAMES) if present <= set(MODULES[name])
        )
        self._ranks[slot] = int(segments[..., 3].max(initial=0))

    def rank_of(self, slot: int) -> int:
        """The largest rank in the slot; 0 where nothing was ever bound."""
        return self._ranks.get(slot, 0)

    def of(self, slots: Iterable[int]) -> str:
        """The least compiled variant that serves rows of these slots."""
        needed = max((self._needs[slot] for slot in slots), default=0)
        return next(name for name in self._compiled if _NAMES.index(name) >= needed)
