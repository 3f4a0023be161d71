"""The least time that a piece of work can take on a device: what its bytes and operations cost.

floor = max(bytes / read bandwidth, operations / matmul rate). Both rates are of an H200, seen by
plain XLA programs: the sum of several large arrays, and a bfloat16 matmul. `bench.peaks` measures
them again, and a benchmark uses whichever is higher.
"""

from __future__ import annotations

import dataclasses

READ_BYTES_PER_S = 4.03e12
FLOPS_PER_S = 790e12
SMALL_S = 20e-6  # below this floor, a share of it says more about launching than about the kernel
LAUNCH_S = 4e-6  # what a kernel may take beyond such a small floor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """What a device can do at best."""

    read_bytes_per_s: float = READ_BYTES_PER_S
    flops_per_s: float = FLOPS_PER_S

    def floor_s(self, num_bytes: float, flops: float = 0.0) -> float:
        """Seconds below which no kernel that moves and computes this can finish."""
        return max(num_bytes / self.read_bytes_per_s, flops / self.flops_per_s)


def limit_s(floor_s: float, share: float) -> float:
    """The longest time that meets a target of `share` of the peak."""
    return floor_s / share if floor_s >= SMALL_S else floor_s + LAUNCH_S
