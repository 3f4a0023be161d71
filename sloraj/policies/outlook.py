"""What will become of the queue: when each waiting sequence is admitted and gets its first token.

`foresee` is the arithmetic, on arrays; `Outlook` gathers them from the engine's state now and then.
Early abort and prefetch ask it. It leans to the early side: it takes every adapter for resident and
every sequence that stops before its maximum for one of average length.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from sloraj.adapters.residency import Residency
from sloraj.config import SchedulerConfig
from sloraj.policies.sparingly import Sparingly
from sloraj.request import Sequence
from sloraj.step_time import StepTimes
from sloraj.token_budget import WEIGHT_BOUND_TOKENS

MAX_PLAYED = 128  # of them, those whose admissions are played through
MAX_SHARE = 0.003  # of the time that looking may take
LENGTH_RATE = 0.05  # how fast the mean share of `max_output_tokens` moves


class Pace(NamedTuple):
    """How fast the engine goes."""

    busy_s: float  # until what is enqueued has ended
    decode_step_s: float  # a step that only decodes what runs now
    full_step_s: float  # the same with all the prefill that a step takes
    steady_step_s: float  # one that also computes the prompts that follow on those that end
    prefill_tokens: int  # in a full step
    page_size: int


class Running(NamedTuple):
    """Sequences that run, in any order, and what is free beside them."""

    remaining: np.ndarray  # i64 [n]: steps until it has ended
    pages: np.ndarray  # i64 [n]: that it holds
    more_pages: np.ndarray  # i64 [n]: that it will want until its end
    num_missing_tokens: int  # of prompts that are not computed yet
    num_free_rows: int
    num_obtainable_pages: int  # free, or of idle adapters


class Waiting(NamedTuple):
    """Sequences that wait, in the order of their turn."""

    tokens: np.ndarray  # i64 [m]: to compute before a token is sampled
    pages: np.ndarray  # i64 [m]: for those tokens
    outputs: np.ndarray  # i64 [m]: steps from its first token to its end


class Forecast(NamedTuple):
    """For each waiting sequence."""

    admission_steps: np.ndarray  # f64 [m]: steps that begin before the one that admits it
    first_token_s: np.ndarray  # f64 [m]: seconds from now
    own_s: np.ndarray  # f64 [m]: of them, those that its own prompt takes
    trough_pages: np.ndarray  # f64 [m]: the most that running ones want until then beyond what ...
    net_pages: np.ndarray  # f64 [m]: ... others release; and the same at that moment


def foresee(waiting: Waiting, running: Running, pace: Pace) -> Forecast:
    """Admission in order, as the scheduler does it: rows and pages as running ones end, and the
    prefill tokens of a step one sequence after the other.
    """
    work = np.cumsum(waiting.tokens) + running.num_missing_tokens
    pipeline = np.ceil(work / pace.prefill_tokens)  # steps, the last of which samples
    own_s = waiting.tokens / pace.prefill_tokens * pace.full_step_s
    capacity, num_unhindered = _capacity_steps(waiting, running, pipeline, pace.page_size)
    backlog = running.num_missing_tokens + int(waiting.tokens[:num_unhindered].sum())
    full_steps = np.minimum(capacity, backlog / pace.prefill_tokens)
    capacity_s = full_steps * pace.full_step_s + (capacity - full_steps) * pace.steady_step_s
    admission = np.maximum(capacity, np.maximum(pipeline - 1, 0))
    trough, net = _wanted_pages(admission, running, pace.page_size)
    return Forecast(
        admission_steps=admission,
        first_token_s=_first_token_s(work, pipeline, capacity_s, own_s, pace),
        own_s=own_s,
        trough_pages=trough,
        net_pages=net,
    )


def _capacity_steps(
    waiting: Waiting, running: Running, pipeline: np.ndarray, page_size: int
) -> tuple[np.ndarray, int]:
    """Steps until there is a row and pages for each, f64 [m], and how many need not wait for them.

    Plays the ends and admissions one after the other; beyond `MAX_PLAYED` it goes on as before.
    """
    last_pages = running.pages + running.more_pages
    ends = list(zip(running.remaining.tolist(), last_pages.tolist(), strict=True))
    heapq.heapify(ends)  # when, and the pages it will hold then
    num_rows, num_pages = running.num_free_rows, float(running.num_obtainable_pages - len(ends))
    moment = 0.0
    num_unhindered = 0
    steps: list[float] = []
    played = (waiting.pages, waiting.outputs, np.maximum(pipeline - 1, 0))
    for pages, outputs, earliest in zip(
        *[values[:MAX_PLAYED].tolist() for values in played], strict=True
    ):
        while ends and (num_rows == 0 or num_pages < pages + 1):
            end, gained = heapq.heappop(ends)
            num_pages += gained - (len(ends) + 1) * max(end - moment, 0) / page_size
            moment = max(moment, end)
            num_rows += 1
        num_unhindered += moment == 0
        steps.append(moment)
        heapq.heappush(ends, (max(moment, earliest) + 1 + outputs, pages + outputs / page_size))
        num_rows -= 1
        num_pages -= pages + 1
    num_left = len(waiting.tokens) - len(steps)
    if num_left:
        half = len(steps) // 2
        slope = (steps[-1] - steps[half]) / max(len(steps) - 1 - half, 1)
        steps += (steps[-1] + slope * np.arange(1, num_left + 1)).tolist()
        num_unhindered += num_left if num_unhindered == MAX_PLAYED else 0
    return np.array(steps), num_unhindered


def _wanted_pages(
    moments: np.ndarray, running: Running, page_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pages that running sequences want beyond what those that end release: the most until each
    moment (in steps), at least 0, and at that moment; f64 [m] each.
    """
    order = np.argsort(running.remaining, kind="stable")
    ends = running.remaining[order]
    released = np.concatenate([[0], np.cumsum(running.pages[order])])  # by the first j that end
    left = np.arange(len(ends), -1, -1)  # that run on after j have ended
    more = running.more_pages[order]
    most = np.concatenate([[0], np.cumsum(more[::-1])])[::-1]  # that those will want in all
    # A sequence's next page may be due at once: one page each beyond its tokens.
    growth = np.minimum(left[:-1] * (1 + ends / page_size), most[:-1])
    before = growth - released[:-1]  # just before each end
    peaks = np.maximum.accumulate(np.concatenate([[0.0], before]))
    place = np.searchsorted(ends, moments, side="right")
    net = np.minimum(left[place] * (1 + moments / page_size), most[place]) - released[place]
    return np.maximum(peaks[place], net), net


def _first_token_s(
    work: np.ndarray, pipeline: np.ndarray, capacity_s: np.ndarray, own_s: np.ndarray, pace: Pace
) -> np.ndarray:
    """Seconds until each first token: the end of the step that computes the last of its prompt."""
    if not len(work):
        return np.zeros(0)
    in_last = work[-1] - (pipeline[-1] - 1) * pace.prefill_tokens
    span_s = pace.full_step_s - pace.decode_step_s
    last_s = pace.decode_step_s + span_s * in_last / pace.prefill_tokens
    steps_s = (pipeline - 1) * pace.full_step_s
    steps_s = steps_s + np.where(pipeline == pipeline[-1], last_s, pace.full_step_s)
    work_s = work / pace.prefill_tokens * pace.full_step_s
    queued_s = work_s + np.maximum.accumulate(capacity_s - (work_s - own_s))
    alone_s = pace.decode_step_s + span_s / pace.full_step_s * own_s
    return np.asarray(pace.busy_s + np.maximum(np.maximum(steps_s, queued_s), capacity_s + alone_s))


class OutputLengths:
    """The share of its `max_output_tokens` that a sequence uses which may stop before."""

    def __init__(self) -> None:
        self._share = 1.0

    def end(self, sequence: Sequence) -> None:
        if not sequence.params.ignore_eos:
            share = len(sequence.output_token_ids) / sequence.max_output_tokens
            self._share += LENGTH_RATE * (share - self._share)

    def remaining(self, sequences: list[Sequence], num_outputs: np.ndarray) -> np.ndarray:
        """Output tokens that each still has to come, which has `num_outputs`; i64, at least 1 where
        it may stop before its maximum.
        """
        limits = np.array([s.max_output_tokens for s in sequences], np.int64)
        may_stop = np.array([not s.params.ignore_eos for s in sequences], bool)
        usual = np.maximum((limits * self._share).astype(np.int64), num_outputs + 1)
        return np.asarray(np.where(may_stop, np.minimum(usual, limits), limits) - num_outputs)


class Outlook:
    """The last forecast, and the sequences it is of."""

    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float],
        step_times: StepTimes,
        residency: Residency,
    ) -> None:
        self.lengths = OutputLengths()
        self.sequences: list[Sequence] = []
        self.forecast = Forecast(*[np.zeros(0)] * len(Forecast._fields))
        self.is_fresh = False  # made in this step
        self.looked_s = 0.0  # when the forecast was made
        self.pace = Pace(0.0, 0.0, 0.0, 0.0, 1, config.page_size)
        self._config = config
        self._clock = clock
        self._sparingly = Sparingly(clock, MAX_SHARE)
        self._step_times = step_times
        self._residency = residency

    def look(self, waiting: Iterable[Sequence], running: list[Sequence], num_rows: int) -> None:
        """Foresee anew if it is time. `waiting` is in order; `num_rows` are free."""
        self.is_fresh = self._sparingly.begin()
        if not self.is_fresh:
            return
        now_s = self.looked_s = self._clock()
        self.sequences = list(waiting)
        if self.sequences:
            self._foresee(now_s, running, num_rows)
        self._sparingly.end()

    def _foresee(self, now_s: float, running: list[Sequence], num_rows: int) -> None:
        sequences, page_size = self.sequences, self._config.page_size
        num_outputs = np.array([len(s.output_token_ids) for s in sequences])
        tokens = np.array([len(s.prompt_token_ids) for s in sequences]) + num_outputs
        remaining = self.lengths.remaining(sequences, num_outputs)
        waiting = Waiting(tokens, -(-tokens // page_size), remaining)
        state, num_computed = self._running(running, num_rows)
        self.pace = self._pace(now_s, state, num_computed, waiting)
        self.forecast = foresee(waiting, state, self.pace)

    def _running(self, running: list[Sequence], num_rows: int) -> tuple[Running, int]:
        """The running sequences, and the tokens that they have computed."""
        num_outputs = np.array([len(s.output_token_ids) for s in running], np.int64)
        num_tokens = np.array([len(s.prompt_token_ids) for s in running], np.int64) + num_outputs
        remaining = self.lengths.remaining(running, num_outputs)
        pages = np.array([len(s.pages) for s in running], np.int64)
        # The last token is sampled and not computed.
        last_pages = -(-(num_tokens + remaining - 1) // self._config.page_size)
        num_computed = sum([s.num_computed_tokens for s in running])
        state = Running(
            remaining=remaining,
            pages=pages,
            more_pages=np.maximum(last_pages - pages, 0),
            num_missing_tokens=max(int(num_tokens.sum()) - num_computed, 0),
            num_free_rows=num_rows,
            num_obtainable_pages=self._residency.num_obtainable_pages,
        )
        return state, num_computed

    def _pace(self, now_s: float, running: Running, num_computed: int, waiting: Waiting) -> Pace:
        """Steps as they are now; full of prefill, half way to when all that can enter has entered;
        and from then on, with prompts and outputs of the usual lengths.
        """
        times, limit = self._step_times, self._config.max_num_batched_tokens
        num_running = len(running.remaining)
        num_pages = running.num_obtainable_pages - num_running
        num_entering = int(np.searchsorted(np.cumsum(waiting.pages + 1), num_pages))
        num_entering = min(num_entering, running.num_free_rows)
        mean_tokens, mean_outputs = float(waiting.tokens.mean()), float(waiting.outputs.mean())
        decode = times.last._replace(
            num_decode_rows=num_running, context_tokens=num_computed,
            num_prefill_tokens=0, num_bound_tokens=0, prefill_pairs=0,
            num_installs=0, install_bytes=0, send_bytes=0,
        )  # fmt: skip
        full = decode._replace(
            num_decode_rows=num_running + num_entering // 2,
            context_tokens=num_computed + int(num_entering * mean_tokens / 2),
            num_prefill_tokens=limit,
            num_bound_tokens=max(limit - WEIGHT_BOUND_TOKENS, 0),
            prefill_pairs=int(limit * mean_tokens / 2),
        )
        num_then = num_running + num_entering
        ends_per_step = num_then / max(mean_outputs, 1)
        then = decode._replace(
            num_decode_rows=num_then,
            context_tokens=int(num_then * (mean_tokens + mean_outputs / 2)),
        )
        prefill_tokens = max(limit - full.num_decode_rows, 1)
        then_s, full_s = times.model.predict(then), times.model.predict(full)
        follow = min(mean_tokens * ends_per_step / prefill_tokens, 1.0)
        return Pace(
            busy_s=times.busy_s(now_s),
            decode_step_s=times.model.predict(decode),
            full_step_s=full_s,
            steady_step_s=then_s + max(full_s - then_s, 0) * follow,
            prefill_tokens=prefill_tokens,
            page_size=self._config.page_size,
        )
