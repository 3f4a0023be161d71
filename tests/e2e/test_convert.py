"""Converted checkpoints: they serve as their originals do, fit one number of devices, and exist
whole or not at all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import orbax_store
from checkpoints.demo import ADAPTERS_DIR, MODEL_DIR
from checkpoints.demo.tasks import BASE_TASK, TASKS, prompt
from checkpoints.hf_weights import open_weights
from serving import cli
from sloraj import Engine, SamplingParams
from sloraj.convert import convert, restore
from sloraj.errors import ConfigError
from sloraj.model.weights import Leaves, flatten, load_parameters
from sloraj.parallel.mesh import make_mesh
from tests.checkpoints.fixtures import tiny_config, write_hf_model
from tests.e2e.driver import quiet

MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"vocab_size": 101},  # the vocabulary is padded to whole devices
    "one-kv-head-biases": {
        "num_kv_heads": 1, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "dtype": "bfloat16",
    },
    "qwen3-tied": {
        "architecture": "Qwen3ForCausalLM", "qk_norm": True, "tie_word_embeddings": True,
    },
}  # fmt: skip


def assert_same(got: Leaves, wanted: Leaves) -> None:
    assert got.keys() == wanted.keys()
    for name, leaf in got.items():
        assert leaf.sharding == wanted[name].sharding, name
        assert leaf.dtype == wanted[name].dtype, name
        assert np.asarray(leaf).tobytes() == np.asarray(wanted[name]).tobytes(), name


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restored_parameters_are_those_of_the_original(
    name: str, tp: int, dtype: str, tmp_path: Path
) -> None:
    config = tiny_config(**MODELS[name])
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    write_hf_model(model, config, seed=7)
    convert(model, out, tp)
    mesh = make_mesh(tp)
    with open_weights(model, config) as weights:
        wanted = flatten(*load_parameters(weights, config, mesh, jnp.dtype(dtype), quiet))
    assert_same(flatten(*restore(out, config, mesh, jnp.dtype(dtype))), wanted)


def test_weights_keep_the_dtype_they_are_stored_in(tmp_path: Path) -> None:
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    write_hf_model(model, tiny_config(dtype="bfloat16"), seed=0)
    convert(model, out)
    manifest = (tmp_path / "out" / orbax_store.MANIFEST).read_text()
    assert "bfloat16" in manifest and "float32" not in manifest


def test_a_converted_model_answers_as_base_and_as_adapter(tmp_path: Path) -> None:
    out = str(tmp_path / "converted")
    assert cli.main(["convert", str(MODEL_DIR), out]) == 0
    names = ["shift-3", "upper"]
    with Engine(
        out, adapters={name: ADAPTERS_DIR / name for name in names},
        max_num_seqs=1, max_num_batched_tokens=32, pool_bytes=2**25,
    ) as engine:  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=40)
        answers = engine.generate(prompt("Hello world"), params, adapter=[None, *names])
    tasks = [BASE_TASK, *(TASKS[name] for name in names)]
    assert [a.text for a in answers] == [task.answer("Hello world") for task in tasks]


def test_another_number_of_devices_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "converted")
    assert cli.main(["convert", str(MODEL_DIR), out, "--tp", "2"]) == 0
    assert f"sloraj serve {out} --tensor-parallel-size 2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="tensor_parallel_size: got 4, allowed: 2") as refused:
        Engine(out, tensor_parallel_size=4)
    assert refused.value.param == "tensor_parallel_size"


def test_what_exists_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert cli.main(["convert", str(MODEL_DIR), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: out: got ")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/does/not/exist"], "no such directory"),
        ([str(MODEL_DIR), "--tp", "3"], "tensor_parallel_size: got 3"),
        ([str(ADAPTERS_DIR / "upper")], "config.json"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", argv[0], str(tmp_path / "out"), *argv[1:]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["_copy_side_files", "json.dump"])
def test_an_interrupted_conversion_leaves_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = str(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(f"checkpoints.orbax_store.{stage}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(str(MODEL_DIR), out)
    assert list(tmp_path.iterdir()) == []
    convert(str(MODEL_DIR), out)  # and nothing stands in the way of the next try
    assert orbax_store.is_converted(out)


def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path: Path) -> None:
    script = (
        "import os, signal; from checkpoints import orbax_store; from sloraj.convert import convert"
        "\norbax_store._copy_side_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
        f"\nconvert({str(MODEL_DIR)!r}, {str(tmp_path / 'out')!r})"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [directory for directory, _, _ in os.walk(tmp_path)]
    assert len(left) > 1  # it was in the middle of its work
    assert not any(orbax_store.is_converted(directory) for directory in left)
    assert not (tmp_path / "out").exists()
