"""What became of one request: the record that every serving benchmark writes, and measures read.

Clients, in-process runs and simulators all make `Outcome`s; `bench.slo` and `bench.fairness` are
functions of them. Moments are seconds on the clock of the trace, 0 being its start, so that a
request's times are compared with its arrival and not with the moment at which a busy client got
around to sending it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np

from bench.records import RecordError
from bench.trace import Request


@dataclasses.dataclass(slots=True, kw_only=True)
class Outcome:
    """One request of a trace and what came of it. Without an `error` it finished."""

    index: int  # in the trace
    adapter: int | None
    tenant: str
    num_prompt_tokens: int
    num_wanted_tokens: int
    arrival_s: float
    sent_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float = 0.0
    num_output_tokens: int = 0
    gaps_s: dict[str, float] | None = None  # quantiles of the time between events that brought text
    token_s: list[float] | None = None  # the moment of each such event, where they are kept
    status: int | None = None  # of HTTP
    finish_reason: str | None = None
    error: str | None = None  # its kind, a colon, the details
    retry_after_s: float | None = None
    segment: int = 0  # counts the times that the run was resumed

    @classmethod
    def of(cls, index: int, request: Request, segment: int = 0) -> Self:
        return cls(
            index=index, adapter=request.adapter, tenant=request.tenant,
            num_prompt_tokens=request.num_prompt_tokens,
            num_wanted_tokens=request.num_output_tokens, arrival_s=request.arrival_s,
            segment=segment,
        )  # fmt: skip

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Raises RecordError if it is the record of something else."""
        try:
            return cls(**record)
        except TypeError as exc:
            raise RecordError(f"got a record of {sorted(record)}, allowed: an outcome") from exc

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def is_finished(self) -> bool:
        return self.error is None

    @property
    def is_short(self) -> bool:
        """Finished with another number of tokens than was asked for: not the same work."""
        return self.is_finished and self.num_output_tokens != self.num_wanted_tokens

    @property
    def error_kind(self) -> str | None:
        return None if self.error is None else self.error.partition(":")[0]

    @property
    def first_token_after_s(self) -> float | None:
        """From arrival to the first token; None if the request failed, however far it came."""
        if self.error is not None or self.first_token_s is None:
            return None
        return self.first_token_s - self.arrival_s

    @property
    def per_token_s(self) -> float | None:
        """Mean time between the tokens after the first."""
        if self.error is not None or self.first_token_s is None or self.last_token_s is None:
            return None
        if self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def token_moments(self) -> np.ndarray:
        """When each output token came, f64 [num_output_tokens]: as recorded if there is a moment
        for each, else evenly between the first and the last.
        """
        if self.token_s is not None and len(self.token_s) == self.num_output_tokens:
            return np.array(self.token_s)
        if self.first_token_s is None or self.last_token_s is None:
            return np.empty(0)
        return np.linspace(self.first_token_s, self.last_token_s, self.num_output_tokens)


def gap_quantiles(moments: list[float]) -> dict[str, float] | None:
    """Median, p90, p99 and longest time between neighbouring moments; None with fewer than two."""
    if len(moments) < 2:
        return None
    gaps = np.diff(moments)
    p50, p90, p99 = np.percentile(gaps, (50, 90, 99))
    found = {"p50": p50, "p90": p90, "p99": p99, "max": gaps.max()}
    return {name: round(float(value), 6) for name, value in found.items()}
