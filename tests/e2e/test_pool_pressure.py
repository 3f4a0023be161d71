"""Adapters and tokens share one pool: each gives way to the other, and everything finishes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.engine_driver import ADAPTERS, EngineDriver
from tests.e2e.test_programs import prompt_of

Start = Callable[..., EngineDriver]
NUM_PAGES = 70  # all adapters but one, or four sequences of the longest kind


def ask_each_adapter(driver: EngineDriver) -> None:
    """One request to each adapter, one after another; all answers are right."""
    versions = [
        driver.loaded(f"a{content}", content, replace=True) for content in range(len(ADAPTERS))
    ]
    for content, version in enumerate(versions):
        request = driver.generate(prompt_of(5, content), f"a{content}", max_tokens=3)
        driver.run()
        driver.check(request, content, version)


def ask_at_length(driver: EngineDriver, name: str | None, num_requests: int) -> list[str]:
    return [
        driver.generate(prompt_of(20, i), name, max_tokens=40, ignore_eos=True)
        for i in range(num_requests)
    ]


@pytest.mark.row(45)
def test_a_pool_full_of_idle_adapters_gives_way_to_tokens_and_the_reverse(start: Start) -> None:
    driver = start(num_pages=NUM_PAGES, max_adapter_slots=len(ADAPTERS))
    ask_each_adapter(driver)
    before = driver.core.stats()
    assert before["num_pages_adapters_idle"] > 0.75 * before["num_pages"]
    requests = ask_at_length(driver, None, 4)
    fewest = before["num_pages_adapters"]
    while not driver.core.is_idle:
        driver.step()
        fewest = min(fewest, driver.core.stats()["num_pages_adapters"])
    assert fewest < 0.25 * before["num_pages"]  # the tokens took nearly all
    for request in requests:
        driver.check(request, None, None)
    evictions = driver.core.stats()["adapter_evictions"]
    assert evictions > before["adapter_evictions"]
    ask_each_adapter(driver)
    after = driver.core.stats()
    assert after["num_pages_adapters_idle"] > 0.75 * after["num_pages"]
    assert after["adapter_installs"] > before["adapter_installs"]
    driver.check_freed()


@pytest.mark.row(45)
def test_an_exhausted_pool_preempts_and_all_finish(start: Start) -> None:
    driver = start(num_pages=NUM_PAGES)
    version = driver.loaded("a", 1)
    plain = ask_at_length(driver, None, 5)
    with_adapter = ask_at_length(driver, "a", 5)
    driver.run()
    assert driver.core.stats()["preemptions"] > 3
    for request in plain:
        driver.check(request, None, None)
    for request in with_adapter:
        driver.check(request, 1, version)
    driver.check_freed()


def test_an_adapter_finds_room_in_a_pool_full_of_tokens(start: Start) -> None:
    """It waits its turn; then the tokens that came before it have given their pages back."""
    driver = start(num_pages=NUM_PAGES)
    version = driver.loaded("a", 1)
    before = ask_at_length(driver, None, 6)
    while driver.core.stats()["num_pages_free"] > 5:
        driver.step()
    request = driver.generate(prompt_of(20), "a", max_tokens=40, ignore_eos=True)
    after = ask_at_length(driver, None, 6)
    driver.run()
    driver.check(request, 1, version)
    for other in (*before, *after):
        driver.check(other, None, None)
    driver.check_freed()
