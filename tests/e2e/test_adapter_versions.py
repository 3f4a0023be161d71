"""A request keeps the adapter version it was admitted with, whatever becomes of the name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sloraj.errors import AdapterNotFound
from tests.checkpoints.fixtures import write_adapter
from tests.e2e.engine_driver import Engine, EngineDriver
from tests.e2e.test_programs import prompt_of
from tests.e2e.token_oracle import Adapter

Start = Callable[..., EngineDriver]
LONG = {"max_tokens": 20, "ignore_eos": True}


def write(directory: Path, engine: Engine, seed: int) -> Adapter:
    modules = write_adapter(
        directory, engine.model_config, seed=seed, ranks=3, targets=("q_proj", "v_proj", "up_proj")
    )
    return Adapter(str(directory), modules)


@pytest.mark.row(35)
@pytest.mark.parametrize("changes", [{}, {"num_pages": 40}], ids=["room for all", "few pages"])
def test_running_requests_finish_on_the_version_before_a_reload_in_place(
    changes: dict[str, int], engine: Engine, start: Start, tmp_path: Path
) -> None:
    driver = start(**changes)
    old = write(tmp_path / "adapter", engine, seed=1)
    old_version = driver.loaded_from("a", old.path)
    running = [driver.generate(prompt_of(9, i), "a", **LONG) for i in range(3)]
    for _ in range(5):
        driver.step()
    assert all(driver.tokens(request) for request in running)
    waiting = [driver.generate(prompt_of(30, i), "a", **LONG) for i in range(6)]
    driver.step()  # they are admitted before the reload, and many do not run before it
    new = write(tmp_path / "adapter", engine, seed=2)
    new_version = driver.loaded_from("a", new.path, replace=True)
    assert new_version != old_version
    later = [driver.generate(prompt_of(9, i), "a", **LONG) for i in range(3)]
    driver.run()
    for request in (*running, *waiting):
        driver.check_adapter(request, old, old_version)
    for request, same_prompt in zip(later, running, strict=True):
        driver.check_adapter(request, new, new_version)
        assert driver.tokens(request) != driver.tokens(same_prompt)
    driver.check_freed()
    assert driver.core.stats()["num_adapter_versions"] == 1  # the old one is gone
    assert (driver.core.stats()["preemptions"] > 0) == bool(changes)


@pytest.mark.row(35)
def test_one_directory_under_two_names_is_one_version(start: Start) -> None:
    driver = start()
    version = driver.loaded("a", 1)
    assert driver.loaded("b", 1) == version
    requests = [driver.generate(prompt_of(9), name, **LONG) for name in ("a", "b")]
    driver.run()
    for request in requests:
        driver.check(request, 1, version)
    assert driver.core.stats()["adapter_installs"] == 1


@pytest.mark.row(36)
def test_requests_that_run_when_their_adapter_is_unloaded_finish_on_it(start: Start) -> None:
    driver = start(max_num_seqs=2)
    version = driver.loaded("a", 1)
    requests = [driver.generate(prompt_of(9, i), "a", **LONG) for i in range(5)]
    for _ in range(4):
        driver.step()
    call_id = driver.unload("a")
    late = driver.generate(prompt_of(9), "a", **LONG)
    driver.step()
    assert isinstance(driver.failures[late], AdapterNotFound)
    assert call_id not in driver.replies  # answered once all is freed
    driver.run()
    assert driver.replies[call_id] is None
    for request in requests:
        driver.check(request, 1, version)
    driver.check_freed()
    stats = driver.core.stats()
    assert stats["num_adapter_versions"] == stats["num_pages_adapters"] == 0


@pytest.mark.row(36)
def test_a_name_can_be_loaded_anew_after_its_unload(start: Start) -> None:
    driver = start()
    for content in (0, 3, 0):
        version = driver.loaded("a", content)
        request = driver.generate(prompt_of(9), "a", **LONG)
        driver.run()
        driver.check(request, content, version)
        driver.unload("a")
        driver.run()
    assert driver.core.stats()["adapter_installs"] == 3
