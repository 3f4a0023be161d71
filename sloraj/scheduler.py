"""Which tokens of which sequences a step computes: first come, first served, in a token budget.

A step takes one token of every decoding sequence, then prefill chunks of the running ones, then of
waiting ones, oldest first. A sequence is admitted when its row, its adapter and pages for all its
known tokens fit; none overtakes the one that waits longest. When the pool is full, idle adapters go
first, then the newest running sequence: it gives all back and later computes its tokens again. So
the oldest one always advances.

The host runs one step ahead of the tokens it has read: `schedule` counts on a token that an
enqueued step samples. A sequence that is preempted with such a token in flight waits until it has
been read; one whose last token is in flight makes room at once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque

import msgspec

from sloraj.adapters.host_store import AdapterVersion, HostStore
from sloraj.adapters.residency import Residency
from sloraj.batch import (
    AdapterInstall,
    SampledToken,
    ScheduledBatch,
    ScheduledRow,
    StepResult,
    TokenLogprobs,
)
from sloraj.config import SchedulerConfig, div_ceil
from sloraj.errors import InternalError
from sloraj.pages import PagePool
from sloraj.request import Sequence, SequenceState
from sloraj.token_budget import cut_to_bucket

PREFETCH_SEQUENCES = 16  # that wait longest, whose adapters are sent before they are admitted


class TokenEvent(msgspec.Struct, frozen=True):
    """What one sampled token means for its sequence. `token_id` None: it is not to be shown."""

    sequence: Sequence
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None  # "stop" or "length"; the sequence owns nothing any more
    stop_token_id: int | None = None
    is_finite: bool = True  # False: the sequence is over without a finish reason


@dataclasses.dataclass(slots=True)
class _Chunk:
    sequence: Sequence
    num_tokens: int
    is_reset: bool


@dataclasses.dataclass(slots=True)
class _Plan:
    """One scheduling pass."""

    budget: int  # tokens left
    chunks: list[_Chunk] = dataclasses.field(default_factory=list)
    installs: list[AdapterInstall] = dataclasses.field(default_factory=list)
    sends: list[AdapterInstall] = dataclasses.field(default_factory=list)
    num_install_pages: int = 0  # of both

    def add(self, chunk: _Chunk) -> None:
        self.chunks.append(chunk)
        self.budget -= chunk.num_tokens


class Scheduler:
    """Owns the queues, the rows and, through pool and residency, all that sequences hold."""

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, residency: Residency, host_store: HostStore
    ) -> None:
        self._config = config
        self._pool = pool
        self._residency = residency
        self._host_store = host_store
        self._waiting: deque[Sequence] = deque()  # oldest first, all newer than those running
        self._running: list[Sequence] = []  # oldest first
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._sent: list[AdapterInstall] = []  # by the last step, for the next one to install
        self._num_enqueued = 0  # steps scheduled and not yet given to `update`
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_computed_tokens = 0
        self.num_sampled_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._running)

    def num_pages_for(self, num_tokens: int) -> int:
        return div_ceil(num_tokens, self._config.page_size)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. The caller leases its adapter version until it is finished."""
        self._waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Free all that a sequence owns, at once. Does nothing if it is finished."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self._vacate(sequence)
        sequence.state = SequenceState.FINISHED

    # --- schedule ---

    def schedule(self) -> ScheduledBatch | None:
        """The next step; None if there is nothing to compute before an enqueued step is read."""
        decoding, prefilling = self._wanting()
        plan = _Plan(self._token_budget(len(decoding), prefilling))
        self._plan_running(plan, decoding + prefilling)
        self._plan_waiting(plan)
        if not plan.chunks:
            return None
        self._plan_sends(plan)
        return self._commit(plan)

    def _wanting(self) -> tuple[list[Sequence], list[Sequence]]:
        """The running sequences that want one token (they decode), and those that want more.

        Those that want none give back what they hold.
        """
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        ending: list[Sequence] = []
        for sequence in self._running:
            num_outputs = len(sequence.output_token_ids) + sequence.num_in_flight
            if num_outputs >= sequence.max_output_tokens:
                ending.append(sequence)
            elif sequence.num_prompt_tokens + num_outputs == sequence.num_computed_tokens + 1:
                decoding.append(sequence)
            else:
                prefilling.append(sequence)
        for sequence in ending:  # the step that computes its last token is enqueued
            self._vacate(sequence)
            sequence.state = SequenceState.ENDING
        return decoding, prefilling

    def _token_budget(self, num_decoding: int, prefilling: list[Sequence]) -> int:
        """Tokens to compute in this step: all that are wanted and may be, or fewer: see there."""
        limit = self._config.max_num_batched_tokens
        wanted = num_decoding + sum(map(_num_missing_tokens, prefilling))
        for sequence in itertools.islice(self._waiting, len(self._free_rows)):
            if wanted >= limit:
                break
            wanted += sequence.num_tokens
        return cut_to_bucket(num_decoding, min(wanted, limit), self._config.token_buckets)

    def _plan_running(self, plan: _Plan, wanting: list[Sequence]) -> None:
        """Plan what running sequences want, decoding ones first.

        Only decoding ones want pages (admission gives those of all known tokens), and they come
        oldest first: so none that is planned here is preempted afterwards.
        """
        for sequence in wanting:
            num_tokens = min(_num_missing_tokens(sequence), plan.budget)
            if num_tokens == 0 or sequence.state is not SequenceState.RUNNING:
                continue
            self._extend(sequence, sequence.num_computed_tokens + num_tokens)
            if sequence.state is SequenceState.RUNNING:
                plan.add(_Chunk(sequence, num_tokens, is_reset=False))

    def _extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Pages for the first `num_tokens` tokens; the newest sequences, or it, may have to go."""
        missing = self.num_pages_for(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return
        while not self._residency.evict_for(missing):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return  # all others are older, and keep what they have
        sequence.pages += self._allocate(sequence, missing)

    def _plan_waiting(self, plan: _Plan) -> None:
        while self._waiting and self._free_rows and plan.budget:
            sequence = self._waiting[0]
            if sequence.num_in_flight or not self._admit(sequence, plan):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            num_tokens = min(_num_missing_tokens(sequence), plan.budget)
            plan.add(_Chunk(sequence, num_tokens, is_reset=True))

    def _plan_sends(self, plan: _Plan) -> None:
        """Bring the adapters of those that wait longest: their bytes go beside this step's work."""
        window = list(itertools.islice(self._waiting, PREFETCH_SEQUENCES))
        keep = {s.version_id for s in window if s.version_id is not None}
        for sequence in window:
            version = self._version_of(sequence)
            if version is None or self._residency.is_resident(version.version_id):
                continue
            total = plan.num_install_pages + version.num_pages
            if plan.num_install_pages and total > self._config.install_pages_per_step:
                break
            # Pages that running sequences will soon want are not worth taking.
            install = self._residency.prefetch(version, 2 * len(self._running), keep)
            if install is None:
                break
            plan.sends.append(install)
            plan.num_install_pages = total

    def _admit(self, sequence: Sequence, plan: _Plan) -> bool:
        """Give the sequence its adapter, its row and pages for all its known tokens, or nothing."""
        version = self._version_of(sequence)
        # One spare page for each running sequence: else its next page would preempt this one again.
        num_pages = self.num_pages_for(sequence.num_tokens)
        if not self._residency.fits(version, num_pages + len(self._running)):
            return False
        if version is not None:
            num_install_pages = self._residency.missing_pages(version)
            total = plan.num_install_pages + num_install_pages
            if num_install_pages and plan.installs and total > self._config.install_pages_per_step:
                return False
            sequence.slot, install = self._residency.acquire(version)
            if install is not None:
                plan.installs.append(install)
                plan.num_install_pages += num_install_pages
        if not self._residency.evict_for(num_pages):
            raise InternalError("admitted a sequence without room for its tokens")
        sequence.pages = self._allocate(sequence, num_pages)
        sequence.row = self._free_rows.pop()
        sequence.state = SequenceState.RUNNING
        return True

    def _commit(self, plan: _Plan) -> ScheduledBatch:
        chunks = sorted(plan.chunks, key=lambda chunk: chunk.num_tokens > 1)
        rows = tuple(self._commit_row(chunk) for chunk in chunks)
        self.num_steps += 1
        self._num_enqueued += 1
        installs, self._sent = (*self._sent, *plan.installs), plan.sends
        return ScheduledBatch(self.num_steps, rows, installs, tuple(plan.sends))

    def _commit_row(self, chunk: _Chunk) -> ScheduledRow:
        sequence, start = chunk.sequence, chunk.sequence.num_computed_tokens
        assert sequence.row is not None
        version = self._version_of(sequence)
        row = ScheduledRow(
            sequence=sequence,
            row=sequence.row,
            slot=sequence.slot,
            adapter_tag=0 if version is None else version.tag,
            start=start,
            num_tokens=chunk.num_tokens,
            first_new_page=self.num_pages_for(start),
            is_reset=chunk.is_reset,
            samples=start + chunk.num_tokens == sequence.num_tokens,
        )
        sequence.num_computed_tokens += chunk.num_tokens
        sequence.num_in_flight += row.samples
        self.num_computed_tokens += chunk.num_tokens
        return row

    # --- update ---

    def update(self, result: StepResult) -> list[TokenEvent]:
        """Take in the oldest enqueued step's tokens; those of finished sequences are dropped."""
        self._num_enqueued -= 1
        events = []
        for sampled in result.tokens:
            if sampled.sequence.state is not SequenceState.FINISHED:
                sampled.sequence.num_in_flight -= 1
                events.append(self._take(sampled))
        return events

    def _take(self, sampled: SampledToken) -> TokenEvent:
        sequence, token = sampled.sequence, sampled.token_id
        if not sampled.is_finite:
            self.abort(sequence)
            return TokenEvent(sequence, None, is_finite=False)
        self.num_sampled_tokens += 1
        num_outputs = len(sequence.output_token_ids)
        # The device never samples a stop id before min_tokens; if one comes, it is plain.
        if token in sequence.stop_ids and num_outputs >= sequence.params.min_tokens:
            self.abort(sequence)
            return TokenEvent(sequence, None, finish_reason="stop", stop_token_id=token)
        sequence.output_token_ids.append(token)
        if num_outputs + 1 < sequence.max_output_tokens:
            return TokenEvent(sequence, token, sampled.logprobs)
        self.abort(sequence)
        return TokenEvent(sequence, token, sampled.logprobs, finish_reason="length")

    # --- what sequences hold ---

    def _version_of(self, sequence: Sequence) -> AdapterVersion | None:
        return None if sequence.version_id is None else self._host_store.get(sequence.version_id)

    def _allocate(self, sequence: Sequence, num_pages: int) -> list[int]:
        pages = self._pool.allocate(num_pages, sequence.tag)
        assert pages is not None  # the caller made room
        return pages

    def _preempt(self, victim: Sequence) -> None:
        """Back to the head of the queue, with nothing.

        An enqueued step may still read and write its pages: it ends before any that is enqueued
        later.
        """
        self._vacate(victim)
        victim.state = SequenceState.WAITING
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self._waiting.appendleft(victim)
        self.num_preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self._running.remove(sequence)
        self._pool.free(sequence.pages, sequence.tag)
        self._free_rows.append(sequence.row)
        if sequence.version_id is not None:
            self._residency.release(sequence.version_id)
        sequence.pages, sequence.row, sequence.slot = [], None, 0

    def check_integrity(self) -> None:
        """Raise InternalError unless rows, pages, pins and queue order add up."""
        rows = self._free_rows + [s.row for s in self._running if s.row is not None]
        if sorted(rows) != list(range(self._config.max_num_seqs)):
            raise InternalError(f"rows {sorted(rows)} are not 0 to {self._config.max_num_seqs - 1}")
        tags = [s.tag for s in [*self._running, *self._waiting]]
        if tags != sorted(set(tags)):
            raise InternalError(f"queue order: sequence tags {tags} do not grow")
        if any(s.pages or s.row is not None for s in self._waiting):
            raise InternalError("a waiting sequence owns pages or a row")
        num_pages = 0
        pins: dict[str, int] = {}
        for sequence in self._running:
            num_pages += len(sequence.pages)
            if any(self._pool.owner_of(page) != sequence.tag for page in sequence.pages):
                raise InternalError(f"sequence {sequence.tag}: owns not all of its pages")
            if sequence.version_id is not None:
                pins[sequence.version_id] = pins.get(sequence.version_id, 0) + 1
        for version in self._host_store:
            pinned = self._residency.num_pins(version.version_id)
            if pins.get(version.version_id, 0) != pinned:
                raise InternalError(
                    f"adapter version {version.version_id}: {pinned} pins, not {pins}"
                )
        total = self._pool.num_free + num_pages + self._residency.num_pages
        if total != self._pool.num_usable:
            raise InternalError(
                f"{self._pool.num_free} free + {num_pages} sequence + {self._residency.num_pages} "
                f"adapter pages != {self._pool.num_usable}"
            )


def _num_missing_tokens(sequence: Sequence) -> int:
    """Tokens without KV, the one in flight included."""
    return sequence.num_tokens - sequence.num_computed_tokens
