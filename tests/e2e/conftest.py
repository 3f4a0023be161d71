"""One real server with the demo model for all tests that ask a server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.served import Served, served


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
