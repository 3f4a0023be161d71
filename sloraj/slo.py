"""How far the objective for the first token was met, by the definitions of S-LoRA (section 7)."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(slots=True)
class SloCounts:
    """Of requests that have ended and had an objective. One that failed got nothing; one that its
    client gave up within the objective is not counted.
    """

    requests: int = 0
    attained: int = 0  # finished, with the first token within less than the objective
    aborted: int = 0  # refused because the first token would have come too late
    satisfaction_sum: float = 0.0  # of 1 - (t / objective)^2, never below 0; nothing for none

    def judge(self, first_token_after_s: float | None, slo_s: float | None) -> None:
        """Count a request, whose first token came that long after its arrival; None: never."""
        if slo_s is None:
            return
        self.requests += 1
        if first_token_after_s is not None:
            self.attained += first_token_after_s < slo_s
            self.satisfaction_sum += max(0.0, 1 - (first_token_after_s / slo_s) ** 2)

    def stats(self) -> dict[str, Any]:
        """The counts, of which the growth of `attained` is the goodput, and the shares so far."""
        counted = max(self.requests, 1)
        return dataclasses.asdict(self) | {
            "attainment": self.attained / counted,
            "satisfaction": self.satisfaction_sum / counted,
        }
