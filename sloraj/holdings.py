"""What running sequences hold: a row, pages and a pinned adapter; given and taken back whole."""

from __future__ import annotations

from sloraj.adapters.host_store import AdapterVersion, HostStore
from sloraj.adapters.residency import Residency
from sloraj.batch import AdapterInstall
from sloraj.config import SchedulerConfig, div_ceil
from sloraj.errors import InternalError
from sloraj.pages import PagePool
from sloraj.request import Sequence


class Holdings:
    """Owns the rows, and on behalf of the scheduler what sequences have of pool and residency."""

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, residency: Residency, host_store: HostStore
    ) -> None:
        self._config = config
        self._pool = pool
        self._residency = residency
        self._host_store = host_store
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def num_pages_for(self, num_tokens: int) -> int:
        return div_ceil(num_tokens, self._config.page_size)

    def version_of(self, sequence: Sequence) -> AdapterVersion | None:
        return None if sequence.version_id is None else self._host_store.get(sequence.version_id)

    def give(self, sequence: Sequence) -> AdapterInstall | None:
        """A row, the adapter and pages for all known tokens. Only where `Residency.fits` says so.

        The install that brings the adapter, if it was not on the device.
        """
        install = None
        version = self.version_of(sequence)
        if version is not None:
            sequence.slot, install = self._residency.acquire(version)
        if not self.grow(sequence, sequence.num_tokens):
            raise InternalError("admitted a sequence without room for its tokens")
        sequence.row = self._free_rows.pop()
        return install

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for the first `num_tokens` tokens, at the cost of idle adapters; False if even
        those are too few, and nothing changes.
        """
        missing = self.num_pages_for(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        if not self._residency.evict_for(missing):
            return False
        pages = self._pool.allocate(missing, sequence.tag)
        assert pages is not None  # there is room now
        sequence.pages += pages
        return True

    def take_back(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self._pool.free(sequence.pages, sequence.tag)
        self._free_rows.append(sequence.row)
        if sequence.version_id is not None:
            self._residency.release(sequence.version_id)
        sequence.pages, sequence.row, sequence.slot = [], None, 0

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raise InternalError unless rows, pages and pins are those of the running sequences."""
        rows = self._free_rows + [s.row for s in running if s.row is not None]
        if sorted(rows) != list(range(self._config.max_num_seqs)):
            raise InternalError(f"rows {sorted(rows)} are not 0 to {self._config.max_num_seqs - 1}")
        num_pages = 0
        pins: dict[str, int] = {}
        for sequence in running:
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
