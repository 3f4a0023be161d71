"""Adapters read by other processes are what a thread reads; no process outlives its loader."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint
from checkpoints.model_config import ModelConfig
from sloraj.adapters import load_processes
from sloraj.adapters.load_processes import LoaderProcesses
from sloraj.adapters.load_worker import LoadSpec, SharedMemory, load
from sloraj.adapters.loader import AdapterLoader, LoadDone
from sloraj.adapters.reader import adapter_loader
from sloraj.config import PoolLayout
from sloraj.errors import AdapterLoadError, EngineUnavailable, InternalError
from sloraj.messages import LoadAdapter
from tests.checkpoints.fixtures import tiny_config, write_adapter

WAIT_S = 30.0
CONFIG = tiny_config()


def layout_of(config: ModelConfig, dtype: str = "bfloat16") -> PoolLayout:
    return PoolLayout(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        page_size=4, tp=1, dtype=dtype,
    )  # fmt: skip


def spec_of(dtype: str = "bfloat16") -> LoadSpec:
    return LoadSpec(model=CONFIG, layout=layout_of(CONFIG, dtype), max_rank=16)


@pytest.fixture
def start() -> Iterator[Callable[..., LoaderProcesses]]:
    started: list[LoaderProcesses] = []

    def make(num_processes: int = 1, dtype: str = "bfloat16") -> LoaderProcesses:
        started.append(LoaderProcesses(spec_of(dtype), np.empty, num_processes))
        return started[-1]

    yield make
    for processes in started:
        processes.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_process_reads_what_a_thread_reads(
    start: Callable[..., LoaderProcesses], tmp_path: Path, dtype: str
) -> None:
    processes = start(dtype=dtype)
    in_thread = adapter_loader(CONFIG, layout_of(CONFIG, dtype), 16)
    for index, rank in enumerate((8, 2, 16)):  # a smaller one after a larger one, and more again
        path = str(tmp_path / f"a{index}")
        write_adapter(path, CONFIG, seed=index, ranks=rank)
        (got, info), (want, _) = processes(path), in_thread(path)
        assert info == {"rank": rank, "path": path}
        assert got.version_id == want.version_id and got.max_rank == want.max_rank == rank
        assert got.pages.dtype == want.pages.dtype and got.pages.shape == want.pages.shape
        assert got.pages.tobytes() == want.pages.tobytes()
        np.testing.assert_array_equal(got.segments, want.segments)


def test_pages_of_one_load_are_not_touched_by_the_next(
    start: Callable[..., LoaderProcesses], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_processes, "KEPT_BYTES", 0)  # the memory goes after every load
    processes = start()
    for index in range(2):
        write_adapter(str(tmp_path / f"a{index}"), CONFIG, seed=index)
    first, _ = processes(str(tmp_path / "a0"))
    before = first.pages.tobytes()
    second, _ = processes(str(tmp_path / "a1"))
    assert first.pages.tobytes() == before != second.pages.tobytes()


def test_what_is_wrong_with_the_files_is_said_as_by_a_thread(
    start: Callable[..., LoaderProcesses], tmp_path: Path
) -> None:
    processes = start()
    write_adapter(str(tmp_path / "wide"), CONFIG, seed=0, ranks=32)
    cases: list[tuple[str, type[Exception]]] = [
        ("nowhere", CheckpointNotFound),
        ("wide", InvalidCheckpoint),
    ]
    for name, kind in cases:
        path = str(tmp_path / name)
        with pytest.raises(kind) as of_thread:
            adapter_loader(CONFIG, layout_of(CONFIG), 16)(path)
        with pytest.raises(kind) as of_process:
            processes(path)
        assert str(of_process.value) == str(of_thread.value)
    write_adapter(str(tmp_path / "sound"), CONFIG, seed=0)
    assert processes(str(tmp_path / "sound"))[0].max_rank > 0  # and goes on


def test_a_value_beyond_the_pools_dtype_keeps_its_class_and_field(
    start: Callable[..., LoaderProcesses], tmp_path: Path
) -> None:
    write_adapter(str(tmp_path), CONFIG, seed=0, alpha=1e9)
    with pytest.raises(AdapterLoadError, match="exceeds the range of float16") as error:
        start(dtype="float16")(str(tmp_path))
    assert error.value.param == "lora_path"


def test_a_process_that_dies_fails_its_load_and_is_replaced(
    start: Callable[..., LoaderProcesses], tmp_path: Path
) -> None:
    write_adapter(str(tmp_path / "a"), CONFIG, seed=0)
    processes = start()
    (pid,) = processes.pids
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(processes, str(tmp_path / "a"))
        time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InternalError, match="its loader process ended with code -9"):
            future.result(WAIT_S)
    assert not is_running(pid) and processes.pids != [pid]
    assert processes(str(tmp_path / "a"))[0].max_rank > 0


def test_closing_ends_every_process_and_fails_the_load_under_way(
    start: Callable[..., LoaderProcesses], tmp_path: Path
) -> None:
    write_adapter(str(tmp_path), CONFIG, seed=0)
    processes = start(2)
    pids = processes.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(processes, str(tmp_path)) for _ in range(3)]
        time.sleep(0.1)
        processes.close()
        for future in futures:
            with pytest.raises(EngineUnavailable):
                future.result(WAIT_S)
    assert not any(map(is_running, pids))
    with pytest.raises(EngineUnavailable):
        processes(str(tmp_path))


def test_the_loader_closes_what_loads_for_it(tmp_path: Path) -> None:
    write_adapter(str(tmp_path), CONFIG, seed=0)
    processes = LoaderProcesses(spec_of(), np.empty, 1)
    (pid,) = processes.pids
    done = threading.Event()
    results: list[LoadDone] = []

    def on_done(result: LoadDone) -> None:
        results.append(result)
        done.set()

    loader = AdapterLoader(processes, on_done, close_load=processes.close)
    loader.start(LoadAdapter(call_id=1, adapter_id="a", path=str(tmp_path)))
    assert done.wait(WAIT_S) and results[0].packed is not None
    loader.close()
    assert not is_running(pid)


def test_a_fault_of_ours_is_told_and_the_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("sloraj.adapters.load_worker.read_adapter", fail)
    with (tmp_path / "memory").open("w+b", buffering=0) as file:
        told = load("anywhere", spec_of(), SharedMemory(file))
    assert "a fault of ours (ZeroDivisionError)" in repr(told)
