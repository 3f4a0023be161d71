"""Laws of the compiled programs: every batch fits one, none is compiled late, pools stay in place.

The fixture `engine` checks after each test here, and of the other laws, that nothing was compiled.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from sloraj.batch import ScheduledBatch
from tests.e2e.engine_driver import MAX_NUM_SEQS, MAX_NUM_TOKENS, Engine, EngineDriver

Start = Callable[..., EngineDriver]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(length * 1000 + seed)
    return [rng.randrange(128) for _ in range(length)]


@pytest.fixture
def batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[ScheduledBatch]:
    """The batches that the runner executes."""
    seen: list[ScheduledBatch] = []
    execute = engine.runner.execute

    def record(batch: ScheduledBatch) -> object:
        seen.append(batch)
        return execute(batch)

    monkeypatch.setattr(engine.runner, "execute", record)
    return seen


@pytest.mark.row(50)
def test_every_number_of_rows_decodes_without_a_compilation(
    start: Start, batches: list[ScheduledBatch]
) -> None:
    driver = start()
    version = driver.loaded("a", 1)
    for num_rows in range(1, MAX_NUM_SEQS + 1):
        requests = [
            driver.generate(prompt_of(2, i), "a" if i % 2 else None, max_tokens=3)
            for i in range(num_rows)
        ]
        driver.run()
        for i, request in enumerate(requests):
            driver.check(request, 1 if i % 2 else None, version if i % 2 else None)
    sizes = {len(batch.rows) for batch in batches if batch.is_decode}
    assert sizes == set(range(1, MAX_NUM_SEQS + 1))


@pytest.mark.row(50)
def test_every_size_of_a_prefill_runs_without_a_compilation(
    start: Start, batches: list[ScheduledBatch]
) -> None:
    driver = start()
    for num_tokens in range(1, MAX_NUM_TOKENS + 1):
        request = driver.generate(prompt_of(num_tokens), max_tokens=1)
        driver.run()
        driver.check(request, None, None)
    assert {batch.num_tokens for batch in batches} == set(range(1, MAX_NUM_TOKENS + 1))


@pytest.mark.row(50)
@pytest.mark.parametrize("variant", [{}, {"temperature": 1.0}, {"logprobs": 3}], ids=str)
def test_every_way_to_sample_runs_in_small_and_large_batches(
    variant: dict[str, float], start: Start
) -> None:
    driver = start()
    for num_rows in (1, MAX_NUM_SEQS):
        requests = [
            driver.generate(prompt_of(3, i), max_tokens=3, **variant) for i in range(num_rows)
        ]
        driver.run()
        for request in requests:
            driver.check(request, None, None)


def test_a_long_prompt_starts_in_what_is_left_of_the_token_budget(
    start: Start, batches: list[ScheduledBatch]
) -> None:
    """The long one owns all its pages at once, more than a step of that size can announce."""
    driver = start(max_num_batched_tokens=MAX_NUM_SEQS)
    short = [driver.generate(prompt_of(1, i), max_tokens=30) for i in range(MAX_NUM_SEQS - 1)]
    for _ in range(3):
        driver.step()
    long = driver.generate(prompt_of(60), max_tokens=2)
    driver.run()
    assert any(b.is_decode and len(b.rows) == MAX_NUM_SEQS for b in batches)  # one token of it
    for request in (*short, long):
        driver.check(request, None, None)


def test_a_step_runs_the_least_program_that_serves_its_adapters(
    start: Start, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a batch with base rows; the answers are right, so nothing needed was left out."""
    ran: list[str] = []
    run_forward = engine.runner._run_forward

    def record(bucket: Any, variant: str, batch: ScheduledBatch) -> Any:
        ran.append(variant)
        return run_forward(bucket, variant, batch)

    monkeypatch.setattr(engine.runner, "_run_forward", record)
    driver = start()
    for adapter, variant in ((None, "base"), (5, "attention"), (6, "all")):
        name = None if adapter is None else f"adapter-{adapter}"
        version = None if name is None or adapter is None else driver.loaded(name, adapter)
        ran.clear()
        requests = [driver.generate(prompt_of(4), name, max_tokens=4)]
        base = driver.generate(prompt_of(3), max_tokens=4)
        driver.run()
        assert set(ran) == {variant}
        driver.check(base, None, None)
        for request in requests:
            driver.check(request, adapter, version)


def test_every_program_updates_the_pool_in_place(engine: Engine) -> None:
    """Donated is not enough: a copy of the pool would show in the temporary bytes."""
    runner = engine.runner
    pool_bytes = sum(pool.nbytes for pool in runner._state.pools)
    writers = [key for key in runner._programs if key[0] in ("forward", "install")]
    names = {key[1] for key in writers}
    assert {"decode-1", f"decode-{MAX_NUM_SEQS}", "mixed-16", "mixed-32", 1, 8} <= names
    for key in writers:
        memory = runner._programs[key].memory_analysis()
        assert memory.alias_size_in_bytes >= pool_bytes, key
        assert memory.temp_size_in_bytes < pool_bytes / len(runner._state.pools) / 4, key


def test_the_pool_stays_at_its_address(engine: Engine, start: Start) -> None:
    def addresses() -> list[int]:
        return [pool.unsafe_buffer_pointer() for pool in engine.runner._state.pools]

    before = addresses()
    driver = start()
    version = driver.loaded("a", 3)
    request = driver.generate(prompt_of(20), "a", max_tokens=5)
    driver.run()
    driver.check(request, 3, version)
    assert addresses() == before
