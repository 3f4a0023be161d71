"""What programs on the CPU did, as `bench.profile_step.stream_events` tells it of a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


def cpu_events(run: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """As `stream_events`, of what the CPU's programs did."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (path,) = Path(directory).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    yield line.name, event
