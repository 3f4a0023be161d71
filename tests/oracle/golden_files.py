"""The golden set on disk, as `record_golden.py` wrote it, for any test that compares with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class GoldenModel:
    """One model directory: the base, its adapters, and recorded logits."""

    name: str

    @property
    def base(self) -> str:
        return str(GOLDEN / self.name / "base")

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(sorted(p.name for p in (GOLDEN / self.name / "adapters").iterdir()))

    def adapter(self, name: str) -> str:
        return str(GOLDEN / self.name / "adapters" / name)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`tokens.<prompt>` int32 [T]; `logits.<adapter or base>.<prompt>` float32 [T, V]."""
        found: dict[str, NDArray[Any]] = load_file(GOLDEN / self.name / "logits.safetensors")
        return found


MODELS = tuple(GoldenModel(p.name) for p in sorted(GOLDEN.iterdir()) if p.is_dir())
PROMPTS = ("short", "long")


def relative_error(got: NDArray[Any], want: NDArray[Any]) -> float:
    """Largest difference of any row, relative to the largest logit of that row; both [T, V]."""
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64)).max(axis=-1)
    return float((difference / np.abs(want).max(axis=-1)).max())
