"""Compiles the programs at start, several at a time, and counts compilations ever after.

The count proves that no request triggers a compilation after readiness.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp

Key = tuple[Any, ...]  # of a program: its kind, then its shape
_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class CompileCounter:
    """Counts this process's compilations from its creation to `close`; those that the persistent
    cache answers are among them.
    """

    def __init__(self) -> None:
        self.num_at_start = self.num_after_ready = self.num_cache_hits = 0
        self.seconds = 0.0
        self._is_ready = self._is_closed = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        jax.monitoring.register_event_listener(self._on_hit)

    def mark_ready(self) -> None:
        self._is_ready = True

    def close(self) -> None:
        self._is_closed = True

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event != _EVENT or self._is_closed:
            return
        self.seconds += duration_secs
        if self._is_ready:
            self.num_after_ready += 1
        else:
            self.num_at_start += 1

    def _on_hit(self, event: str, **_: str | int) -> None:
        self.num_cache_hits += event == _CACHE_HIT and not self._is_closed


@dataclasses.dataclass(frozen=True, slots=True)
class CompileJob:
    """A jitted function and the abstract arguments it is compiled for."""

    key: Key
    program: Any
    arguments: tuple[Any, ...]


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """An i32 argument that comes from the host."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def compile_all(
    jobs: list[CompileJob], progress: Callable[[str, int, int], None]
) -> dict[Key, Any]:
    """Compiled programs by key. Tracing is sequential, XLA's work runs on all cores.

    Calling a compiled program with other shapes is an error, never a compilation.
    """
    progress("compile", 0, len(jobs))
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = {pool.submit(job.program.lower(*job.arguments).compile): job.key for job in jobs}
        compiled = {}
        for future in concurrent.futures.as_completed(futures):
            compiled[futures[future]] = future.result()
            progress("compile", len(compiled), len(jobs))
    return compiled
