"""What a build makes of settings that were left open."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.errors import ConfigError
from tests.checkpoints.fixtures import tiny_config, write_hf_model
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


def test_service_is_measured_by_the_bytes_of_the_model(tmp_path: Path) -> None:
    write_hf_model(tmp_path, tiny_config(), seed=0)
    core, _ = build_core(settings(tmp_path, pool_bytes=20 * PAGE_BYTES, queue_order="vtc"), quiet)
    num_parameters = sum(
        tensor.size
        for path in tmp_path.glob("*.safetensors")
        for tensor in load_file(path).values()
    )
    measured = core._config.base_bytes
    assert measured.weights == 4 * num_parameters  # float32
    assert measured.row == 4 * num_parameters + 512 * PAGE_BYTES // 16  # max_num_seqs is 1
    assert core.stats()["queue"]["tenants"] == 0
