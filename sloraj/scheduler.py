"""Which tokens of which sequences a step computes, in a token budget.

A step takes one token of every decoding sequence, then prefill chunks of the running ones, then of
waiting ones, in the order of the queue (`policies/`). A sequence is admitted when its row, its
adapter and pages for all its known tokens fit; what would fit does not overtake whose turn it is.
When the pool is full, idle adapters go first, then the running sequence admitted last: it gives all
back and later computes its tokens again. So the one admitted longest ago always advances.

The host runs one step ahead of the tokens it has read: `schedule` counts on a token that an
enqueued step samples. A sequence that is preempted with such a token in flight waits until it has
been read; one whose last token is in flight makes room at once.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import msgspec

from sloraj.adapters.host_store import HostStore
from sloraj.adapters.residency import Residency
from sloraj.batch import (
    AdapterInstall,
    SampledToken,
    ScheduledBatch,
    ScheduledRow,
    StepResult,
    TokenLogprobs,
)
from sloraj.config import SchedulerConfig
from sloraj.errors import InternalError
from sloraj.holdings import Holdings
from sloraj.pages import PagePool
from sloraj.policies.early_abort import TooLate
from sloraj.policies.foresight import Foresight
from sloraj.policies.waiting import WaitingQueue, make_queue
from sloraj.request import Sequence, SequenceState
from sloraj.step_plan import Chunk, Plan
from sloraj.step_time import StepTimes
from sloraj.token_budget import cut_to_bucket


class TokenEvent(msgspec.Struct, frozen=True):
    """What one sampled token means for its sequence. `token_id` None: it is not to be shown."""

    sequence: Sequence
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None  # "stop" or "length"; the sequence owns nothing any more
    stop_token_id: int | None = None
    is_finite: bool = True  # False: the sequence is over without a finish reason


class Scheduler:
    """Owns the queues and, through `Holdings`, all that sequences hold."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        residency: Residency,
        host_store: HostStore,
        clock: Callable[[], float],
        step_times: StepTimes,
    ) -> None:
        self._config = config
        self._residency = residency
        self._holdings = Holdings(config, pool, residency, host_store)
        self._foresight = Foresight(config, clock, step_times, residency, self._holdings.version_of)
        if self._foresight.order is None:
            self._waiting = make_queue(config.queue, config.base_bytes, clock, self._loaded_bytes)
        else:
            self._waiting = WaitingQueue(self._foresight.order)
        self._running: list[Sequence] = []  # in the order of their admission
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

    def num_waiting_of(self, tenant: str) -> int:
        """How many new sequences of a tenant wait, if tenants have accounts; else 0."""
        return self._waiting.num_waiting_of(tenant)

    def queue_stats(self) -> dict[str, Any]:
        return self._waiting.stats()

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. The caller leases its adapter version until it is finished."""
        self._waiting.add(sequence)
        self._residency.want(sequence.version_id)
        self._foresight.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Free all that a sequence owns, at once. Does nothing if it is finished."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            self._residency.unwant(sequence.version_id)
        elif sequence.state is SequenceState.RUNNING:
            self._end(sequence)
        sequence.state = SequenceState.FINISHED

    # --- schedule ---

    def too_late(self) -> list[TooLate]:
        """The waiting sequences that are not to be served any more. The caller aborts them."""
        return self._foresight.too_late(self._waiting, self._running, self._holdings.num_free_rows)

    def schedule(self) -> ScheduledBatch | None:
        """The next step; None if there is nothing to compute before an enqueued step is read."""
        decoding, prefilling = self._wanting()
        plan = Plan(self._token_budget(len(decoding), prefilling))
        self._plan_running(plan, decoding + prefilling)
        self._plan_waiting(plan)
        if not plan.chunks:
            return None
        num_rows = self._holdings.num_free_rows
        self._foresight.plan_sends(
            plan, self._waiting, self._running, num_rows, is_tight=self._is_tight
        )
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
            self._end(sequence)
            sequence.state = SequenceState.ENDING
        return decoding, prefilling

    def _token_budget(self, num_decoding: int, prefilling: list[Sequence]) -> int:
        """Tokens to compute in this step: all that are wanted and may be, or fewer: see there."""
        limit = self._config.max_num_batched_tokens
        wanted = num_decoding + sum(s.num_missing_tokens for s in prefilling)
        for sequence in self._waiting.in_order(self._holdings.num_free_rows):
            if wanted >= limit:
                break
            wanted += sequence.num_tokens
        return cut_to_bucket(num_decoding, min(wanted, limit), self._config.token_buckets)

    def _plan_running(self, plan: Plan, wanting: list[Sequence]) -> None:
        """Plan what running sequences want, decoding ones first.

        Only decoding ones want pages (admission gives those of all known tokens), and they come
        oldest first: so none that is planned here is preempted afterwards.
        """
        for sequence in wanting:
            num_tokens = min(sequence.num_missing_tokens, plan.budget)
            if num_tokens == 0 or sequence.state is not SequenceState.RUNNING:
                continue
            self._extend(sequence, sequence.num_computed_tokens + num_tokens)
            if sequence.state is SequenceState.RUNNING:
                plan.add(Chunk(sequence, num_tokens, is_reset=False))

    def _extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Pages for the first `num_tokens` tokens; those admitted last, or it, may have to go."""
        while not self._holdings.grow(sequence, num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return  # all others were admitted before it, and keep what they have

    def _plan_waiting(self, plan: Plan) -> None:
        self._waiting.start_pass()
        while self._holdings.num_free_rows and plan.budget:
            sequence = self._waiting.first(is_tight=self._is_tight)
            if sequence is None:
                break
            if sequence.num_in_flight or not self._admit(sequence, plan):
                if self._waiting.pass_over():
                    continue
                break
            num_tokens = min(sequence.num_missing_tokens, plan.budget)
            plan.add(Chunk(sequence, num_tokens, is_reset=True))

    @property
    def _is_tight(self) -> bool:
        """Whether what is left is kept from tenants that run too many already."""
        headroom = self._config.queue.tenant_headroom
        if not headroom:
            return False
        rows, pages = self._config.max_num_seqs, self._config.num_pages
        return (
            self._holdings.num_free_rows <= headroom * rows
            or self._residency.num_obtainable_pages - len(self._running) <= headroom * pages
        )

    def _admit(self, sequence: Sequence, plan: Plan) -> bool:
        """Give the sequence its adapter, its row and pages for all its known tokens, or nothing."""
        version = self._holdings.version_of(sequence)
        # One spare page for each running sequence: else its next page would preempt this one again.
        num_pages = self._holdings.num_pages_for(sequence.num_tokens) + len(self._running)
        if not self._residency.fits(version, num_pages):
            return False
        if version is not None:
            num_install_pages = self._residency.missing_pages(version)
            total = plan.num_install_pages + num_install_pages
            if num_install_pages and plan.installs and total > self._config.install_pages_per_step:
                return False
        loaded_bytes = self._loaded_bytes(sequence)
        install = self._holdings.give(sequence)
        if install is not None:
            plan.installs.append(install)
            plan.num_install_pages += install.packed.num_pages
        self._waiting.admit(sequence, loaded_bytes)
        self._residency.unwant(sequence.version_id)
        self._running.append(sequence)
        sequence.state = SequenceState.RUNNING
        return True

    def _loaded_bytes(self, sequence: Sequence) -> int:
        """Bytes of its adapter that the device has, or would get, for this sequence alone."""
        version = self._holdings.version_of(sequence)
        return 0 if version is None else self._residency.unused_bytes(version)

    def _commit(self, plan: Plan) -> ScheduledBatch:
        chunks = sorted(plan.chunks, key=lambda chunk: chunk.num_tokens > 1)
        rows = tuple(self._commit_row(chunk) for chunk in chunks)
        self._waiting.sampled(row.sequence for row in rows if row.samples)
        self.num_steps += 1
        self._num_enqueued += 1
        installs, self._sent = (*self._sent, *plan.installs), plan.sends
        return ScheduledBatch(self.num_steps, rows, installs, tuple(plan.sends))

    def _commit_row(self, chunk: Chunk) -> ScheduledRow:
        sequence = chunk.sequence
        row = chunk.row(self._holdings.version_of(sequence), self._config.page_size)
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

    # --- give back ---

    def _preempt(self, victim: Sequence) -> None:
        """Back to the head of the queue, with nothing. The victim is the one admitted last.

        An enqueued step may still read and write its pages: it ends before any that is enqueued
        later.
        """
        self._vacate(victim)
        victim.state = SequenceState.WAITING
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self._waiting.put_back(victim)
        self._residency.want(victim.version_id)
        self.num_preemptions += 1

    def _end(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        self._waiting.finish(sequence)
        self._foresight.end(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._holdings.take_back(sequence)

    def check_integrity(self) -> None:
        """Raise InternalError unless rows, pages, pins and the order of admission add up."""
        wanted = collections.Counter(
            s.version_id for s in self._waiting if s.version_id is not None
        )
        if wanted != self._residency.wanted:
            raise InternalError(f"wanted: {self._residency.wanted} counted, {wanted} wait")
        self._holdings.check_integrity(self._running)
        self._waiting.check_integrity(self._running)
