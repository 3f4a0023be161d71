"""What one scheduling pass has decided so far."""

from __future__ import annotations

import dataclasses

from sloraj.adapters.host_store import AdapterVersion
from sloraj.batch import AdapterInstall, ScheduledRow
from sloraj.config import div_ceil
from sloraj.request import Sequence


@dataclasses.dataclass(slots=True)
class Chunk:
    """The next `num_tokens` tokens of a running sequence."""

    sequence: Sequence
    num_tokens: int
    is_reset: bool  # its row is new

    def row(self, version: AdapterVersion | None, page_size: int) -> ScheduledRow:
        sequence, start = self.sequence, self.sequence.num_computed_tokens
        assert sequence.row is not None
        return ScheduledRow(
            sequence=sequence,
            row=sequence.row,
            slot=sequence.slot,
            adapter_tag=0 if version is None else version.tag,
            start=start,
            num_tokens=self.num_tokens,
            first_new_page=div_ceil(start, page_size),
            is_reset=self.is_reset,
            samples=start + self.num_tokens == sequence.num_tokens,
        )


@dataclasses.dataclass(slots=True)
class Plan:
    """One pass of the scheduler, which fills it and makes the step of it."""

    budget: int  # tokens left
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    installs: list[AdapterInstall] = dataclasses.field(default_factory=list)
    sends: list[AdapterInstall] = dataclasses.field(default_factory=list)
    num_install_pages: int = 0  # of both

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.budget -= chunk.num_tokens
