"""What one scheduling pass has decided so far."""

from __future__ import annotations

import dataclasses

from sloraj.batch import AdapterInstall
from sloraj.request import Sequence


@dataclasses.dataclass(slots=True)
class Chunk:
    """The next `num_tokens` tokens of a running sequence."""

    sequence: Sequence
    num_tokens: int
    is_reset: bool  # its row is new


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
