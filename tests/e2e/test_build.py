"""What a build makes of settings that were left open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sloraj.adapters.load_processes import LoaderProcesses
from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.errors import ConfigError
from sloraj.messages import Shutdown
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model
from tests.e2e.driver import quiet

# float32: 2 layers x (key and value) x 16 tokens x 2 kv heads x head_dim 16
PAGE_BYTES = 2 * 2 * 16 * 2 * 16 * 4


def settings(model: Path, **more: object) -> EngineConfig:
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_rank": 4}
    return EngineConfig(model=str(model), **(sizes | more))  # type: ignore[arg-type]


def test_a_context_nobody_asked_for_gives_way_to_the_pool(tmp_path: Path) -> None:
    write_hf_model(tmp_path, tiny_config(), seed=0)
    core, info = build_core(settings(tmp_path, pool_bytes=20 * PAGE_BYTES), quiet)
    assert info["num_pages"] == 20
    assert 0 < info["max_model_len"] < 256
    assert info["max_model_len"] % 16 == 0
    core.check_integrity()


def test_a_context_that_was_asked_for_does_not(tmp_path: Path) -> None:
    write_hf_model(tmp_path, tiny_config(), seed=0)
    with pytest.raises(ConfigError, match="pool_bytes"):
        build_core(settings(tmp_path, pool_bytes=20 * PAGE_BYTES, max_model_len=256), quiet)


def test_loader_processes_load_the_adapters_and_end_with_the_engine(tmp_path: Path) -> None:
    write_hf_model(tmp_path / "base", tiny_config(), seed=0)
    for name in ("a", "b", "c"):
        write_adapter(tmp_path / "adapters" / name, tiny_config(), seed=ord(name), ranks=4)
    core, _ = build_core(
        settings(tmp_path / "base", adapters_dir=str(tmp_path / "adapters"), loader_processes=2),
        quiet,
    )
    load = core._adapter_calls._loader._load
    assert isinstance(load, LoaderProcesses)
    pids = load.pids
    assert core.stats()["num_adapters"] == 3 and len(pids) == 2
    core.submit(Shutdown())
    core.step()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
