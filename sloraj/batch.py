"""Plain values between the scheduler, which makes them, and the runner, which executes them.

Order of effects within one step: installs, then row resets, then page appends, then the forward
pass over all rows, then sampling for the rows that ask for it. Sends run beside all of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import msgspec
import numpy as np

from sloraj.request import Sequence


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """One adapter version in pool layout, ready to send. Made by `sloraj.adapters.layout`."""

    version_id: str  # content hash: weights, config and load options
    pages: np.ndarray  # [num_pages, num_layers, tp * page_elems], pool dtype, contiguous
    segments: np.ndarray  # i32 [num_layers, num_modules, 4]: kind, a_chunk, b_chunk, rank
    max_rank: int

    @property
    def num_pages(self) -> int:
        return int(self.pages.shape[0])

    @property
    def num_bytes(self) -> int:
        return int(self.pages.nbytes)


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterInstall:
    """Copy a version's pages into the pool and point `slot` at them."""

    slot: int
    tag: int  # owner tag of the version's pages
    pages: tuple[int, ...]
    packed: PackedAdapter


class ScheduledRow(msgspec.Struct, frozen=True):  # made for every row of every step, at C's speed
    """`num_tokens` tokens of one sequence, from position `start`, computed in this step.

    Token ids at positions the host does not know yet (at most the last one) come from the row's
    device state. Of `sequence.pages`, those from `first_new_page` to the one of the last token are
    new to the device in this step; of later ones it learns when it computes their tokens, so that
    a step announces no more pages than its tokens fill.
    """

    sequence: Sequence
    row: int
    slot: int
    adapter_tag: int  # 0 for the base model
    start: int
    num_tokens: int
    first_new_page: int
    is_reset: bool  # the row was just assigned: send its sampling state and clear its counts
    samples: bool  # the chunk reaches the last token, so a token is sampled


@dataclasses.dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Rows are ordered: single-token rows first, then prefill chunks."""

    step: int
    rows: tuple[ScheduledRow, ...]
    installs: tuple[AdapterInstall, ...] = ()
    sends: tuple[AdapterInstall, ...] = ()  # the next step's first installs: their bytes may go now

    @property
    def num_tokens(self) -> int:
        return sum(r.num_tokens for r in self.rows)

    @property
    def is_decode(self) -> bool:
        return all(r.num_tokens == 1 for r in self.rows)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The model's own log-probabilities at one sampled position: before penalties, bias,
    temperature.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most probable first


class SampledToken(msgspec.Struct, frozen=True):
    """The token sampled for one scheduled row, read by the host one step behind."""

    sequence: Sequence
    token_id: int
    is_finite: bool  # False: the row's logits held NaN or Inf; the token is meaningless
    logprobs: TokenLogprobs | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    step: int
    tokens: tuple[SampledToken, ...]
    owner_violations: int = 0  # checked mode: rows that would have read another owner's page


class Runner(Protocol):
    """Owns every device array and every copy between host and device."""

    def execute(self, batch: ScheduledBatch) -> Any:
        """Enqueue a step (installs included) and return a handle; never waits for the device."""

    def collect(self, handle: Any) -> StepResult:
        """Wait for an enqueued step and return its tokens."""

    def stats(self) -> dict[str, Any]:
        """Counters for `Engine.stats`: programs, compiles since readiness, bytes, times."""
