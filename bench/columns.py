"""The outcomes of a run as columns: one list for each field, so that a run is one line of JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench.outcome import Outcome

FIELDS = (
    "adapter", "tenant", "num_prompt_tokens", "num_wanted_tokens", "arrival_s", "sent_s",
    "first_token_s", "last_token_s", "ended_s", "num_output_tokens", "error", "retry_after_s",
)  # fmt: skip
DIGITS = 4  # of seconds: a tenth of a millisecond


def to_columns(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """Of outcomes in the order of their trace; a column of nothing is left out."""
    found = {}
    for name in FIELDS:
        column = [_rounded(getattr(outcome, name)) for outcome in outcomes]
        if any(value is not None for value in column):
            found[name] = column
    return found


def from_columns(columns: dict[str, list[Any]]) -> list[Outcome]:
    """Raises TypeError if a column is of something else."""
    names = [field.name for field in dataclasses.fields(Outcome)]
    num = len(columns["arrival_s"])
    empty = [None] * num
    return [
        Outcome(index=index, **{name: columns.get(name, empty)[index] for name in FIELDS})
        for index in range(num)
        if set(columns) <= set(names)
    ]


def _rounded(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
