"""Counts XLA compilations, to prove that no request triggers one after readiness."""

from __future__ import annotations

from typing import Any

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts this process's compilations from its creation to `close`."""

    def __init__(self) -> None:
        self.num_at_start = self.num_after_ready = 0
        self.seconds = 0.0
        self._is_ready = self._is_closed = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def mark_ready(self) -> None:
        self._is_ready = True

    def close(self) -> None:
        self._is_closed = True

    def _on_event(self, event: str, duration_s: float, **_: Any) -> None:
        if event != _EVENT or self._is_closed:
            return
        self.seconds += duration_s
        if self._is_ready:
            self.num_after_ready += 1
        else:
            self.num_at_start += 1
