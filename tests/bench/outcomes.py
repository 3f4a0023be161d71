"""Outcomes for tests, by hand and at random."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from bench.outcome import Outcome


def outcome(
    index: int = 0, arrival_s: float = 0.0, after_s: float | None = 1.0, *, tenant: str = "a",
    prompt: int = 10, tokens: int = 5, gap_s: float = 0.5, **kwargs: Any,
) -> Outcome:  # fmt: skip
    """One that got its first token `after_s` from arrival and the others every `gap_s`; None: it
    failed without a token.
    """
    first = None if after_s is None else arrival_s + after_s
    last = None if first is None else first + (tokens - 1) * gap_s
    made = Outcome(
        index=index, adapter=index, tenant=tenant, num_prompt_tokens=prompt,
        num_wanted_tokens=tokens, arrival_s=arrival_s, sent_s=arrival_s, first_token_s=first,
        last_token_s=last, ended_s=arrival_s + 1.0 if last is None else last,
        num_output_tokens=0 if first is None else tokens,
        error="http: 503 busy" if first is None else None,
    )  # fmt: skip
    for name, value in kwargs.items():
        setattr(made, name, value)
    return made


OUTCOMES = st.lists(
    st.builds(
        outcome,
        index=st.integers(0, 9),
        arrival_s=st.integers(0, 160).map(lambda eighths: eighths / 8),
        after_s=st.none() | st.integers(1, 100).map(lambda eighths: eighths / 8),
        tenant=st.sampled_from("abc"),
        prompt=st.integers(1, 20),
        tokens=st.integers(1, 8),
        gap_s=st.integers(1, 16).map(lambda eighths: eighths / 8),
    ),
    min_size=1,
    max_size=16,
)
"""All times are eighths of a second, which floats hold exactly."""
