"""Drives a runner's steps by hand: rows at a chosen context, no scheduler and no waiting.

What the device takes for a step is thus seen without the host's work in it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Seq

import numpy as np

from sloraj.batch import AdapterInstall, PackedAdapter, ScheduledBatch, ScheduledRow
from sloraj.config import div_ceil
from sloraj.request import SamplingParams, Sequence
from sloraj.runner import DeviceRunner

GREEDY = SamplingParams(temperature=0.0)
UNCOUNTED = 4  # first steps of a run of prefills


class StepDriver:
    """Rows and adapter slots of one runner, whose pages are handed out once and never freed."""

    def __init__(
        self, runner: DeviceRunner, *, page_size: int, num_pages: int, vocab_size: int
    ) -> None:
        self._runner, self._page_size, self._vocab_size = runner, page_size, vocab_size
        self._pages = iter(range(1, num_pages))  # StopIteration: the pool is too small
        self._tags = itertools.count(1)
        self._slots = itertools.count(1)
        self._slot_tags = {0: 0}
        self._installs: list[AdapterInstall] = []
        self._rng = np.random.default_rng(0)

    def install(self, packed: PackedAdapter) -> int:
        """A slot with a copy of its own of this adapter, on the device from the next step on."""
        slot, tag = next(self._slots), next(self._tags)
        self._slot_tags[slot] = tag
        pages = tuple(next(self._pages) for _ in range(packed.num_pages))
        self._installs.append(AdapterInstall(slot=slot, tag=tag, pages=pages, packed=packed))
        return slot

    def open_rows(self, slots: Seq[int], context: int, first_row: int = 0) -> list[Sequence]:
        """Sequences of `context` random prompt tokens on rows from `first_row` on; nothing is
        computed.
        """
        prompts = self._rng.integers(3, self._vocab_size, (len(slots), context)).tolist()
        return [
            Sequence(
                request_id=f"row-{row}", index=0, prompt_token_ids=prompt,
                params=GREEDY, max_output_tokens=1 << 20, stop_ids=frozenset(), seed=0,
                tag=next(self._tags), version_id=None, arrival_s=0.0, row=row, slot=slot,
            )
            for row, (slot, prompt) in enumerate(zip(slots, prompts, strict=True), start=first_row)
        ]  # fmt: skip

    def batch(self, *parts: tuple[Seq[Sequence], int]) -> ScheduledBatch:
        """Of each part (sequences, number of tokens), the next tokens of every sequence; and the
        installs asked for so far.
        """
        rows = [row for sequences, num_tokens in parts for row in self._rows(sequences, num_tokens)]
        installs, self._installs = tuple(self._installs), []
        return ScheduledBatch(0, tuple(rows), installs)

    def _rows(self, sequences: Seq[Sequence], num_tokens: int) -> list[ScheduledRow]:
        rows = []
        for sequence in sequences:
            start, first_new_page = sequence.num_computed_tokens, len(sequence.pages)
            stop = start + num_tokens
            while len(sequence.pages) < div_ceil(stop, self._page_size):
                sequence.pages.append(next(self._pages))
            assert sequence.row is not None
            rows.append(
                ScheduledRow(
                    sequence=sequence, row=sequence.row, slot=sequence.slot,
                    adapter_tag=self._slot_tags[sequence.slot], start=start, num_tokens=num_tokens,
                    first_new_page=first_new_page, is_reset=start == 0, samples=True,
                )
            )  # fmt: skip
            sequence.num_computed_tokens = stop
        return rows

    def prefill(self, sequences: Seq[Sequence], at_once: int) -> float | None:
        """Compute all prompts, `at_once` in a step, enqueued without waiting; seconds a step.

        The first steps are not counted: they install adapters and are not captured in a graph.
        None where only those are left.
        """
        context = sequences[0].num_prompt_tokens
        firsts = range(0, len(sequences), at_once)
        started = time.perf_counter()
        for step, first in enumerate(firsts):
            batch = self.batch((sequences[first : first + at_once], context))
            handle = self._runner.execute(batch)
            if step < UNCOUNTED:
                self._runner.collect(handle)
                started = time.perf_counter()
        self._runner.collect(handle)
        counted = len(firsts) - UNCOUNTED
        return None if counted < 1 else (time.perf_counter() - started) / counted

    def decode(self, sequences: Seq[Sequence], num_steps: int) -> float:
        """Seconds a step of `num_steps` decode steps, enqueued without waiting for tokens."""
        handle = self._runner.execute(self.batch((sequences, 1)))
        self._runner.collect(handle)
        started = time.perf_counter()
        for _ in range(num_steps):
            handle = self._runner.execute(self.batch((sequences, 1)))
        self._runner.collect(handle)
        return (time.perf_counter() - started) / num_steps

    def mixed(self, sequences: Seq[Sequence], others: Seq[Sequence]) -> float:
        """Seconds a step in which all sequences decode beside the whole prompt of one other."""
        for step, other in enumerate(others):
            batch = self.batch((sequences, 1), ([other], other.num_prompt_tokens))
            handle = self._runner.execute(batch)
            if step < UNCOUNTED:
                self._runner.collect(handle)
                started = time.perf_counter()
        self._runner.collect(handle)
        return (time.perf_counter() - started) / (len(others) - UNCOUNTED)
