"""Host memory that the device reads at the full speed of the bus: where packed adapters lie.

Memory is taken in slabs, each registered with the driver once, which is slow (the first touch of
its pages); afterwards writing to it costs a copy, and sending from it is one transfer without
another copy on the host.
"""

from __future__ import annotations

import bisect
import collections
import logging
import math
import threading
import weakref
from typing import Any

import jax
import numpy as np

from sloraj.errors import InternalError

SLAB_BYTES = 256 << 20
ALIGNMENT = 4096
_log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]


class _Block:
    """Bytes of a slab, as numpy sees them. Every view keeps it alive, and a transfer its view."""

    def __init__(self, slab: Array, start: int, num_bytes: int) -> None:
        self._slab = slab
        self.__array_interface__ = {
            "version": 3,
            "data": (slab.ctypes.data + start, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
        }


class _Slab:
    """One registered array and its free extents, ascending, never adjacent."""

    def __init__(self, num_bytes: int) -> None:
        self.memory: Array = np.empty(num_bytes, np.uint8)
        self.free: list[tuple[int, int]] = [(0, num_bytes)]  # start, stop

    @property
    def is_free(self) -> bool:
        return self.free == [(0, self.memory.nbytes)]

    def take(self, num_bytes: int) -> int | None:
        """Start of the first extent that is large enough, cut from the free ones."""
        for i, (start, stop) in enumerate(self.free):
            if stop - start >= num_bytes:
                rest = (start + num_bytes, stop)
                self.free[i : i + 1] = [rest] if rest[0] < stop else []
                return start
        return None

    def give_back(self, start: int, stop: int) -> None:
        i = bisect.bisect_left(self.free, (start, stop))
        if i and self.free[i - 1][1] == start:
            i -= 1
            start = self.free.pop(i)[0]
        if i < len(self.free) and self.free[i][0] == stop:
            stop = self.free.pop(i)[1]
        self.free.insert(i, (start, stop))


class HostArena:
    """Allocates arrays; one returns to the arena when nothing refers to it any more.

    Thread-safe. `device` None: ordinary memory.
    """

    def __init__(self, device: jax.Device | None, slab_bytes: int = SLAB_BYTES) -> None:
        self._client = None if device is None or device.platform == "cpu" else device.client
        self._slab_bytes = slab_bytes
        self._slabs: list[_Slab] = []
        self._lock = threading.Lock()
        # The garbage collector may run anywhere, under the lock too: it only notes what is free.
        self._returned: collections.deque[tuple[_Slab, int, int]] = collections.deque()

    @property
    def num_bytes(self) -> int:
        """Of all slabs."""
        return sum(slab.memory.nbytes for slab in self._slabs)

    @property
    def num_used_bytes(self) -> int:
        with self._lock:
            self._take_back()
            free = sum(stop - start for slab in self._slabs for start, stop in slab.free)
            return self.num_bytes - free

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of any content."""
        num_bytes = math.prod(shape) * dtype.itemsize
        rounded = max(-(-num_bytes // ALIGNMENT), 1) * ALIGNMENT
        with self._lock:
            self._take_back()
            slab, start = self._find(rounded)
        block = _Block(slab.memory, start, num_bytes)
        finalizer = weakref.finalize(block, self._returned.append, (slab, start, start + rounded))
        finalizer.atexit = False
        return np.asarray(block).view(dtype).reshape(shape)

    def _find(self, num_bytes: int) -> tuple[_Slab, int]:
        for slab in self._slabs:
            start = slab.take(num_bytes)
            if start is not None:
                return slab, start
        slab = _Slab(max(num_bytes, self._slab_bytes))
        if self._client is not None:
            self._client.dma_map(slab.memory.ctypes.data, slab.memory.nbytes)
        self._slabs.append(slab)
        start = slab.take(num_bytes)
        assert start is not None
        return slab, start

    def _take_back(self) -> None:
        """Free what the garbage collector has noted, and all slabs but one that are free."""
        while self._returned:
            slab, start, stop = self._returned.popleft()
            slab.give_back(start, stop)
        for slab in [slab for slab in self._slabs if slab.is_free][1:]:
            if self._client is not None:
                self._client.dma_unmap(slab.memory.ctypes.data)
            self._slabs.remove(slab)

    def check_integrity(self) -> None:
        """Raise InternalError unless the free extents are in order, apart and in their slabs."""
        with self._lock:
            self._take_back()
            for slab in self._slabs:
                edges = [edge for extent in slab.free for edge in extent]
                if edges != sorted(set(edges)) or (edges and edges[-1] > slab.memory.nbytes):
                    raise InternalError(f"host arena: free extents {slab.free} are out of order")
