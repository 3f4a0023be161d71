"""Loads make threads take short turns, and only while they run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from sloraj.adapters.loader import TURN_S, AdapterLoader, LoadDone, ShortTurns, short_turns
from sloraj.messages import LoadAdapter


@pytest.fixture(autouse=True)
def python_turns() -> Iterator[float]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield 0.005
    sys.setswitchinterval(before)


def test_turns_are_short_until_the_last_one_leaves(python_turns: float) -> None:
    turns = ShortTurns()
    with turns:
        with turns:
            assert sys.getswitchinterval() == pytest.approx(TURN_S)
        assert sys.getswitchinterval() == pytest.approx(TURN_S)
    assert sys.getswitchinterval() == pytest.approx(python_turns)


def test_turns_shorter_than_ours_are_left_alone() -> None:
    sys.setswitchinterval(TURN_S / 5)
    before = sys.getswitchinterval()
    with ShortTurns():
        assert sys.getswitchinterval() == before
    assert sys.getswitchinterval() == before


def test_a_load_that_fails_gives_the_turns_back(python_turns: float) -> None:
    seen: list[float] = []
    done = threading.Event()
    errors: list[LoadDone] = []

    def load(path: str) -> None:
        with short_turns:
            seen.append(sys.getswitchinterval())
            raise OSError(path)

    def on_done(message: LoadDone) -> None:
        errors.append(message)
        done.set()

    loader = AdapterLoader(load, on_done)  # type: ignore[arg-type]
    loader.start(LoadAdapter(call_id=1, adapter_id="a", path="nowhere"))
    assert done.wait(10)
    loader.close()
    assert seen == [pytest.approx(TURN_S)]
    assert errors[0].error is not None
    assert sys.getswitchinterval() == pytest.approx(python_turns)
