"""A device in plain Python: pages with contents and owners, rows, slots, steps read one behind.

Its tokens can be computed by hand: the next token is a hash of all tokens before it, of what lies
in the adapter's pages and of the seed. It reads that back through the row's page table and the
slot's pages, so a scheduler that hands out a wrong page, row, slot or order changes a token or
counts as a violation. As on the device, a step takes effect in the order of `execute`; `collect`
only tells.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sloraj.batch import (
    AdapterInstall,
    PackedAdapter,
    SampledToken,
    ScheduledBatch,
    ScheduledRow,
    StepResult,
    TokenLogprobs,
)
from sloraj.request import Sequence

BASE = 0  # what "lies in the pages" of the base model


def packed_adapter(content: int, num_pages: int, max_rank: int = 8) -> PackedAdapter:
    """An adapter whose every page holds `content` and the page's place."""
    places = np.arange(num_pages, dtype=np.int64)
    pages = (content * 1000 + places).reshape(num_pages, 1, 1)
    return PackedAdapter(f"v{content}", pages, np.zeros((1, 7, 4), np.int32), max_rank)


def next_token(tokens: list[int], adapter: int, seed: int, vocab_size: int) -> int:
    """The whole model: the token after `tokens` under the adapter that holds `adapter`."""
    text = ",".join(map(str, (*tokens, adapter, seed))).encode()
    return zlib.crc32(text) % vocab_size


def tokens_alone(
    prompt: list[int], adapter: int, seed: int, vocab_size: int, max_tokens: int, stop_ids: set[int]
) -> tuple[list[int], str]:
    """What a request must answer whatever else runs: its tokens and its finish reason."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        token = next_token(prompt + tokens, adapter, seed, vocab_size)
        if token in stop_ids:
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"


def seed_of(sequence: Sequence) -> int:
    """Greedy choices do not depend on the seed."""
    return 0 if sequence.params.is_greedy else sequence.seed


@dataclasses.dataclass
class _Row:
    tag: int
    pages: list[int] = dataclasses.field(default_factory=list)
    last_token: int | None = None


@dataclasses.dataclass
class _Slot:
    tag: int
    pages: tuple[int, ...]


class FakeRunner:
    """Implements `sloraj.batch.Runner`. `violations` must stay empty."""

    def __init__(
        self, num_pages: int, page_size: int, max_num_seqs: int, vocab_size: int, max_tokens: int
    ) -> None:
        self.page_size, self.vocab_size = page_size, vocab_size
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_tokens
        self.owners = [0] * num_pages
        self.cells: list[list[Any]] = [[None] * page_size for _ in range(num_pages)]
        self.rows: dict[int, _Row] = {}
        self.slots: dict[int, _Slot] = {}
        self.violations: list[str] = []
        self.sent: tuple[AdapterInstall, ...] = ()
        self.num_sends = 0
        self.batches: list[ScheduledBatch] = []
        self.keep_batches = False
        self.handles: list[StepResult] = []  # enqueued, not read
        self.before_execute: Callable[[ScheduledBatch], None] = lambda batch: None
        self.is_finite: Callable[[Sequence], bool] = lambda sequence: True

    # --- Runner ---

    def execute(self, batch: ScheduledBatch) -> StepResult:
        self.before_execute(batch)
        if self.keep_batches:
            self.batches.append(batch)
        self._check_batch(batch)
        first = batch.installs[: len(self.sent)]
        self._require(first == self.sent, "what was sent is not what is installed first")
        self.sent = batch.sends
        self.num_sends += len(batch.sends)
        for install in batch.installs:
            self._install(install)
        for row in batch.rows:
            self._prepare(row)
        sampled = [self._forward(row) for row in batch.rows]
        result = StepResult(batch.step, tuple(token for token in sampled if token is not None))
        self.handles.append(result)
        return result

    def collect(self, handle: StepResult) -> StepResult:
        assert self.handles.pop(0) is handle, "steps are read in the order they were enqueued"
        return handle

    def stats(self) -> dict[str, Any]:
        return {"violations": len(self.violations)}

    # --- the device ---

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            self.violations.append(what)

    def _check_batch(self, batch: ScheduledBatch) -> None:
        counts = [row.num_tokens for row in batch.rows]
        self._require(len(self.handles) <= 1, "more than one step ahead of the host")
        self._require(bool(counts) and min(counts) >= 1, "an empty batch or row")
        self._require(sum(counts) <= self.max_num_batched_tokens, "over the token budget")
        first_prefill = sum(count == 1 for count in counts)
        self._require(all(c == 1 for c in counts[:first_prefill]), "a chunk before single tokens")
        rows = [row.row for row in batch.rows]
        self._require(len(set(rows)) == len(rows), "a row twice in one batch")
        self._require(all(0 <= row < self.max_num_seqs for row in rows), "no such row")

    def _install(self, install: AdapterInstall) -> None:
        self._require(install.slot != 0, "slot 0 is the base model's")
        self.slots[install.slot] = _Slot(install.tag, install.pages)
        for page, place in zip(install.pages, range(install.packed.num_pages), strict=True):
            self._take_page(page, install.tag)
            self.cells[page][0] = int(install.packed.pages[place, 0, 0])

    def _take_page(self, page: int, tag: int) -> None:
        self._require(page != 0, "the null page was handed out")
        self.owners[page] = tag
        self.cells[page] = [None] * self.page_size

    def _prepare(self, row: ScheduledRow) -> None:
        if row.is_reset:
            self.rows[row.row] = _Row(row.sequence.tag)
            self._require(row.first_new_page == 0 and row.start == 0, "a reset row continues")
        state = self.rows[row.row]
        self._require(state.tag == row.sequence.tag, "the row is another sequence's")
        self._require(len(state.pages) == row.first_new_page, "page appends do not join")
        num_pages = -(-(row.start + row.num_tokens) // self.page_size)
        for page in row.sequence.pages[row.first_new_page : num_pages]:
            self._take_page(page, row.sequence.tag)
            state.pages.append(page)

    def _adapter(self, row: ScheduledRow) -> int:
        """What the adapter's pages hold, read through the slot."""
        if row.slot == 0:
            self._require(row.adapter_tag == 0, "an adapter's row runs on the base model")
            return BASE
        slot = self.slots[row.slot]
        self._require(slot.tag == row.adapter_tag, "the slot is another version's")
        for place, page in enumerate(slot.pages):
            self._require(self.owners[page] == slot.tag, "an adapter page is another owner's")
            self._require(
                (self.cells[page][0] or -1) % 1000 == place, "an adapter page was overwritten"
            )
        return int(self.cells[slot.pages[0]][0]) // 1000

    def _forward(self, row: ScheduledRow) -> SampledToken | None:
        sequence, state = row.sequence, self.rows[row.row]
        adapter = self._adapter(row)
        end = row.start + row.num_tokens
        for position in range(row.start, end):
            known = position < sequence.num_known_tokens
            token = sequence.token_id(position) if known else state.last_token
            self._require(known or position == sequence.num_known_tokens, "two unknown tokens")
            page = state.pages[position // self.page_size]
            self._require(self.owners[page] == state.tag, "wrote another owner's page")
            self.cells[page][position % self.page_size] = (state.tag, position, adapter, token)
        tokens = []
        for position in range(end):
            page = state.pages[position // self.page_size]
            self._require(self.owners[page] == state.tag, "read another owner's page")
            cell = self.cells[page][position % self.page_size]
            self._require(cell[:3] == (state.tag, position, adapter), f"read a wrong cell: {cell}")
            tokens.append(cell[3])
        self._require(
            row.samples == (end == sequence.num_tokens - row.samples), "samples at a wrong place"
        )
        if not row.samples:
            return None
        state.last_token = next_token(tokens, adapter, seed_of(sequence), self.vocab_size)
        logprobs = None
        if sequence.params.logprobs is not None:
            logprobs = TokenLogprobs(state.last_token, -1.0, ((state.last_token, -1.0),))
        is_finite = self.is_finite(sequence)
        return SampledToken(sequence, state.last_token, is_finite, logprobs)
