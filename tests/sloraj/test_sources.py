"""Adapters named at start: which directories count, and the rank that is compiled for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sloraj.adapters.sources import find_adapters, largest_rank
from sloraj.config import EngineConfig
from sloraj.errors import ConfigError
from tests.checkpoints.fixtures import tiny_config, write_adapter


def test_every_adapter_directory_is_found_by_its_name_and_nothing_else(tmp_path: Path) -> None:
    for name, rank in (("b", 8), ("a", 96)):
        write_adapter(tmp_path / name, tiny_config(), seed=0, ranks=rank)
    (tmp_path / "not-an-adapter").mkdir()
    (tmp_path / "file").write_text("x")
    config = EngineConfig(model="m", adapters=(("x", "/some/path"),), adapters_dir=str(tmp_path))
    found = find_adapters(config)
    assert found == [
        ("x", "/some/path"),
        ("a", str(tmp_path / "a")),
        ("b", str(tmp_path / "b")),
    ]
    assert largest_rank(found) == 96


def test_small_ranks_leave_room_for_adapters_loaded_later(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", tiny_config(), seed=0, ranks=4)
    assert largest_rank([("a", str(tmp_path / "a"))]) == 64


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", tiny_config(), seed=0)
    config = EngineConfig(model="m", adapters=(("a", "/p"),), adapters_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="'a' is given twice"):
        find_adapters(config)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapters_dir"):
        find_adapters(EngineConfig(model="m", adapters_dir=str(tmp_path / "none")))
