"""What a build makes of settings that were left open."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR
from checkpoints.demo.tasks import BASE_TASK, TASKS, prompt
from checkpoints.hf_weights import open_weights
from checkpoints.model_config import TARGET_MODULES
from checkpoints.peft_adapter import read_adapter
from sloraj.adapters.load_processes import LoaderProcesses
from sloraj.build import build_core
from sloraj.config import EngineConfig
from sloraj.engine import Engine
from sloraj.errors import ConfigError
from sloraj.messages import Shutdown
from sloraj.model.merge import merge_adapter
from sloraj.model.weights import load_parameters
from sloraj.parallel.mesh import make_mesh
from sloraj.request import SamplingParams
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model
from tests.e2e.driver import quiet
from tests.oracle import numpy_llama

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


@pytest.mark.parametrize(
    ("adapter_pool_bytes", "reason"),
    [
        (0, "1 and up, and less than pool_bytes"),
        (20 * PAGE_BYTES, "1 and up, and less than pool_bytes"),
        (PAGE_BYTES, "holds one adapter of max_rank"),
        (19 * PAGE_BYTES, "leaves 0 tokens of KV cache, allowed: one that leaves 16"),
    ],
)
def test_a_split_that_leaves_one_side_without_room_is_refused(
    tmp_path: Path, adapter_pool_bytes: int, reason: str
) -> None:
    write_hf_model(tmp_path, tiny_config(), seed=0)
    with pytest.raises(ConfigError, match=f"adapter_pool_bytes: got .*{reason}"):
        build_core(
            settings(tmp_path, pool_bytes=20 * PAGE_BYTES, adapter_pool_bytes=adapter_pool_bytes),
            quiet,
        )


def test_the_papers_baselines_compute_what_the_engine_computes(tmp_path: Path) -> None:
    """Gathered, padded, and with adapters and KV apart, the demo still does its tasks."""
    tasks = [BASE_TASK, *(TASKS[name] for name in ("shift-3", "reverse", "upper"))]
    with Engine(
        str(MODEL_DIR), kernels="bmm", pad_ranks=True, pool_bytes=64 << 20,
        adapter_pool_bytes=8 << 20, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128,
        adapters=tuple((task.id, str(Path(ADAPTERS_DIR) / task.id)) for task in tasks[1:]),
        compilation_cache_dir="",
    ) as engine:  # fmt: skip
        answers = engine.generate(
            prompt("hello world"),
            SamplingParams(max_tokens=40, temperature=0),
            adapter=[None, *(task.id for task in tasks[1:])],
        )
    assert [a.text for a in answers] == [task.answer("hello world") for task in tasks]


def test_a_merged_adapter_is_the_base_model_s_own_weights() -> None:
    with Engine(
        str(MODEL_DIR), merged_adapter=str(Path(ADAPTERS_DIR) / "shift-3"), max_num_seqs=2,
        max_num_batched_tokens=32, max_model_len=128, compilation_cache_dir="",
    ) as engine:  # fmt: skip
        (answer,) = engine.generate(
            prompt("hello world"), SamplingParams(max_tokens=40, temperature=0)
        )
    assert answer.text == TASKS["shift-3"].answer("hello world")


def test_merged_weights_are_the_float64_sum_rounded_once(tmp_path: Path) -> None:
    config = tiny_config()
    stored = write_hf_model(tmp_path / "base", config, seed=0)
    modules = write_adapter(tmp_path / "adapter", config, seed=1, targets=TARGET_MODULES, ranks=3)
    mesh, dtype = make_mesh(1), jnp.dtype(jnp.float32)
    with open_weights(str(tmp_path / "base"), config) as weights:
        _, layers = load_parameters(weights, config, mesh, dtype, quiet)
    merged = merge_adapter(layers, read_adapter(str(tmp_path / "adapter"), config), config)
    deltas = numpy_llama.merge(modules)
    for index in range(config.num_layers):
        want = [
            stored[f"model.layers.{index}.{part}.weight"].astype(np.float64)
            + deltas[index, part.rpartition(".")[2]]
            for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        ]
        np.testing.assert_allclose(merged[index]["qkv"], np.concatenate(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [{"tensor_parallel_size": 2}, {"quantization": "int8"}])
def test_what_cannot_be_merged_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write_hf_model(tmp_path, tiny_config(), seed=0)
    with pytest.raises(ConfigError, match="merged_adapter: got tensor_parallel_size"):
        build_core(settings(tmp_path, merged_adapter=str(tmp_path), **change), quiet)


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
