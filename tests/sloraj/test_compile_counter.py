"""What is compiled, and what the persistent cache answers, is counted until the counter closes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sloraj.runner.compiles import CompileCounter, CompileJob, compile_all, ints

CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture
def cache_dir(tmp_path: Path) -> Iterator[Path]:
    wanted = CACHE | {"jax_compilation_cache_dir": str(tmp_path)}
    before = {name: getattr(jax.config, name) for name in wanted}
    _set(wanted)
    yield tmp_path
    _set(before)


def _set(values: dict[str, object]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _compile(counter: CompileCounter) -> tuple[int, int]:
    """Compilations and cache hits of one program, each time traced anew."""
    before = counter.num_at_start, counter.num_cache_hits
    program = jax.jit(lambda x: jnp.cumsum(x) * 3)
    compile_all([CompileJob(("triple",), program, (ints(11),))], lambda *_: None)
    return counter.num_at_start - before[0], counter.num_cache_hits - before[1]


def test_a_second_start_finds_its_programs_in_the_cache(cache_dir: Path) -> None:
    counter = CompileCounter()
    assert _compile(counter) == (1, 0)
    assert any(cache_dir.iterdir())
    assert _compile(counter) == (1, 1)
    counter.close()
    assert _compile(counter) == (0, 0)
