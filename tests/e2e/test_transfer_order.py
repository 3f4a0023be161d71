"""A step's own data goes to the device before adapters that only the next step wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tests.e2e.engine_driver import ADAPTERS, MAX_NUM_SEQS, EngineDriver
from tests.e2e.test_programs import prompt_of


def test_adapters_are_sent_behind_the_data_of_the_step_that_sends_them(
    start: Callable[..., EngineDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = start()
    versions = [driver.loaded(f"a{i}", i, replace=True) for i in range(len(ADAPTERS))]
    put: list[str] = []
    device_put, runner = jax.device_put, driver.engine.runner
    execute = runner.execute

    def spy(array: Any, *args: Any, **kwargs: Any) -> Any:
        put.append("step" if np.ndim(array) == 1 else "pages")
        return device_put(array, *args, **kwargs)

    def run(batch: Any) -> Any:
        put.append("sends" if batch.sends else "none")
        return execute(batch)

    monkeypatch.setattr(jax, "device_put", spy)
    monkeypatch.setattr(runner, "execute", run)
    requests = [
        (driver.generate(prompt_of(9, i), f"a{i % len(ADAPTERS)}", max_tokens=3), i % len(ADAPTERS))
        for i in range(2 * MAX_NUM_SEQS + len(ADAPTERS))
    ]
    driver.run()
    for request, content in requests:
        driver.check(request, content, versions[content])
    sending = [i for i, event in enumerate(put) if event == "sends"]
    assert sending
    for i in sending:  # what the step installs without having been sent comes first of all
        following = put[i + 1 :]
        step = following.index("step")
        assert "sends" not in following[:step] and "none" not in following[:step]
        assert following[step + 1] == "pages"
