"""What end-to-end tests share: one warm runner for all laws, and one real server for the demo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine_driver import Engine, EngineDriver, build_engine
from tests.e2e.served import Served, served


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


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, which the servers of one test run share."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(given) if given else tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, program_cache: Path) -> Iterator[Served]:
    """The demo served with page owners checked in every step; it ends as a server has to."""
    folder = tmp_path_factory.mktemp("served")
    with served(folder, program_cache, "--checked", "--max-num-waiting", "1024") as server:
        yield server
        server.wait_idle()
        assert server.engine("runner_compiles_after_ready") == 0
        server.stop()
