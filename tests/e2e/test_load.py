"""Two minutes of everything at once: hundreds of streams over every adapter, clients that leave,
adapters that come and go; each answer is checked, and in the end nothing is left over.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time

import pytest

from tests.e2e.load import Outcome, run_load
from tests.e2e.served import Footprint, Served

TRAFFIC_S = float(os.environ.get("SLORAJ_LOAD_S", "115"))
NUM_CLIENTS = 240
MIN_IN_FLIGHT = 200
MAX_MISMATCHES = 0.005  # of the answers; the demo's own accuracy is 99.95 % and up
MAX_GROWTH_MIB = 64.0


@pytest.mark.row(37)
@pytest.mark.row(50)
@pytest.mark.timeout(400)
def test_two_minutes_of_load_give_right_answers_and_leave_nothing(
    demo: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(run_load(demo, seconds=3, num_clients=NUM_CLIENTS))  # what is made only once
    demo.wait_idle()
    pids = (demo.process.pid, demo.engine_pid)
    before = _settled(pids)
    start = demo.metrics()

    outcome = asyncio.run(run_load(demo, seconds=TRAFFIC_S, num_clients=NUM_CLIENTS))
    with capsys.disabled():
        print(f"\n{outcome.summary()}")

    assert outcome.problems == []
    assert min(outcome.in_flight) >= MIN_IN_FLIGHT
    assert statistics.median(outcome.running) >= MIN_IN_FLIGHT
    assert outcome.num_cancelled and outcome.num_reloads and outcome.num_unloads
    assert len(outcome.mismatches) < MAX_MISMATCHES * outcome.num_answers
    assert _told_otherwise_alone(demo, outcome) == []

    demo.wait_idle()
    end = demo.metrics()
    for name in ("num_adapters", "num_adapter_versions", "host_adapter_bytes"):
        assert end[f"sloraj:engine_{name}"] == start[f"sloraj:engine_{name}"], name
    # Idle adapters may stay on the device; no sequence holds a page.
    for found in (start, end):
        num_pages = (
            found["sloraj:engine_num_pages_free"] + found["sloraj:engine_num_pages_adapters"]
        )
        assert num_pages == found["sloraj:engine_num_pages"]
    assert end["sloraj:engine_num_adapters_draining"] == 0
    assert end["sloraj:engine_runner_compiles_after_ready"] == 0

    after = _settled(pids)
    for now, then in zip(after, before, strict=True):
        assert now.num_threads <= then.num_threads, (before, after)
        assert now.num_files <= then.num_files, (before, after)
    grown = [now.resident_mib - then.resident_mib for now, then in zip(after, before, strict=True)]
    with capsys.disabled():
        print(f"memory has grown by {grown[0]:.1f} MiB (server), {grown[1]:.1f} MiB (engine)")
    assert max(grown) < MAX_GROWTH_MIB


def _settled(pids: tuple[int, ...]) -> list[Footprint]:
    """What the processes hold once their threads and files have stayed the same for a second: the
    connections of the last requests take a moment to close.
    """
    deadline = time.monotonic() + 30
    seen, since = [Footprint.of(pid) for pid in pids], time.monotonic()
    while time.monotonic() - since < 1:
        assert time.monotonic() < deadline, f"threads and files keep changing: {seen}"
        time.sleep(0.05)
        now = [Footprint.of(pid) for pid in pids]
        if [(f.num_threads, f.num_files) for f in now] != [
            (f.num_threads, f.num_files) for f in seen
        ]:
            since = time.monotonic()
        seen = now
    return seen


def _told_otherwise_alone(demo: Served, outcome: Outcome) -> list[str]:
    """Of the answers that are not the right ones: those that the same prompt alone does not get."""
    return [
        f"{asked.body()}: {text!r} in the crowd, {alone!r} alone"
        for asked, text in outcome.mismatches
        if (alone := asked.alone(demo)) != text
    ]
