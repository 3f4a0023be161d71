"""One warm runner for all laws, and the watch over it: nothing may be compiled while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.engine_driver import Engine, EngineDriver, build_engine


@pytest.fixture(scope="session")
def warm_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = build_engine(tmp_path_factory.mktemp("engine"))
    yield engine
    engine.runner.close()


@pytest.fixture
def engine(warm_engine: Engine) -> Iterator[Engine]:
    # Other test files compile what they like; this counter sees the whole process.
    before = warm_engine.runner.stats()["compiles_after_ready"]
    yield warm_engine
    assert warm_engine.runner.stats()["compiles_after_ready"] == before


@pytest.fixture
def start(engine: Engine) -> Callable[..., EngineDriver]:
    """Start a core on the runner; keywords change its SchedulerConfig."""

    def start(**changes: Any) -> EngineDriver:
        return EngineDriver(engine, **changes)

    return start
