"""Starts an engine and puts a `Frontend` before it: what both `Engine` and the server call."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from tqdm import tqdm

from sloraj.config import EngineConfig
from sloraj.errors import InternalError
from sloraj.frontend import Frontend
from sloraj.frontend_api import ModelInfo
from sloraj.process_transport import START_TIMEOUT_S, ProcessTransport
from sloraj.tokenizer import load_tokenizer
from sloraj.transport import (
    DEFAULT_CORE_FACTORY,
    OnProgress,
    ThreadTransport,
    Transport,
)


def start_frontend(
    config: EngineConfig,
    *,
    process: bool = True,
    core_factory: str = DEFAULT_CORE_FACTORY,
    on_progress: OnProgress | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Frontend:
    """Build the engine that `config` describes and return a ready frontend; blocks until then.

    `process` puts the engine in a process of its own, else it runs in a thread of this one.
    `on_progress` is called with (stage, done, total). Raises ConfigError or AdapterLoadError,
    whatever the build failed of, and EngineUnavailable when the process dies or is not ready after
    `start_timeout_s`; nothing is left running then.
    """
    tokenizer = load_tokenizer(config.model)
    transport: Transport = (
        ProcessTransport(config, core_factory=core_factory, start_timeout_s=start_timeout_s)
        if process
        else ThreadTransport(config, core_factory=core_factory)
    )
    info = transport.start(on_progress or _no_progress)
    try:
        return Frontend(transport, tokenizer, _model_info(info))
    except BaseException:
        transport.stop()
        raise


def _model_info(info: dict[str, Any]) -> ModelInfo:
    try:
        return msgspec.convert(info, ModelInfo)
    except msgspec.ValidationError as error:
        raise InternalError(f"the engine describes itself wrongly: {error}") from error


def _no_progress(stage: str, done: int, total: int) -> None:
    """For callers who do not look."""


class ProgressBars:
    """An `OnProgress` that draws one bar a stage on stderr. Close it when the start-up is over."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._bar: tqdm[Any] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=stage, file=sys.stderr, leave=True)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done == total:  # shown at once, and what is logged next gets a line of its own
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
