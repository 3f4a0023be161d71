"""What this process has open, to compare before and after."""

from __future__ import annotations

import contextlib
import os


def open_files() -> set[tuple[str, str]]:
    """Descriptors and what they are of; a pipe or socket has a name that no other one gets.

    What was open before may be closed by a garbage collection at any time: what is left open is
    what is here and was not, not how many there are.
    """
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    return found
