"""Ways to reach an engine core: in a thread of this process, or in a process of its own.

Both are used alike: `start` builds the core and returns its info, `listen` begins delivery, `send`
posts a message, `stop` ends everything within a bound. The last message delivered is always one
`Dead`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from checkpoints.errors import CheckpointError
from sloraj.config import EngineConfig
from sloraj.errors import ConfigError, EngineUnavailable, InternalError, SlorajError
from sloraj.messages import Dead, FromEngine, Shutdown, ToEngine

OnMessages = Callable[[list[FromEngine]], None]
OnProgress = Callable[[str, int, int], None]  # stage, done, total
DEFAULT_CORE_FACTORY = "sloraj.build:build_core"
STOP_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


class Core(Protocol):
    """What a transport needs of `sloraj.core.EngineCore`."""

    def submit(self, message: ToEngine) -> None:
        """Post a message; safe from any thread, never blocks."""

    def run(self, emit: OnMessages) -> None:
        """The loop; returns after Shutdown, raises when it cannot go on."""


CoreFactory = Callable[[EngineConfig, OnProgress], tuple[Core, dict[str, Any]]]


class Transport(Protocol):
    """The engine's end as a frontend sees it."""

    def start(self, on_progress: OnProgress) -> dict[str, Any]:
        """Build the engine; returns the fields of ModelInfo. Raises what made it fail, typed."""

    def listen(self, on_messages: OnMessages) -> None:
        """Deliver messages, in order, from one thread, until one `Dead` has been delivered."""

    def send(self, message: ToEngine) -> None:
        """Post a message. Raises EngineUnavailable once the engine is gone."""

    def stop(self) -> None:
        """End the engine now and wait for it, within a bound. Idempotent, safe from any thread."""


def resolve_factory(core_factory: str | CoreFactory) -> CoreFactory:
    """The function that "module:function" names. Raises ConfigError."""
    if not isinstance(core_factory, str):
        return core_factory
    module, _, function = core_factory.partition(":")
    try:
        found: CoreFactory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"core_factory: got {core_factory!r} ({error}), allowed: 'module:function', importable",
            param="core_factory",
        ) from error
    return found


def build_error(error: Exception) -> SlorajError:
    """What a failed build is to the caller: unusable model files are a wrong setting of theirs."""
    if isinstance(error, SlorajError):
        return error
    if isinstance(error, CheckpointError):
        return ConfigError(str(error), param=error.field or "model")
    return InternalError(f"{type(error).__name__}: {error}")


class ThreadTransport:
    """The core in a daemon thread of this process. Messages are passed as they are.

    The core is built by the thread that calls `start`, so errors and interrupts reach the caller
    directly.
    """

    def __init__(
        self, config: EngineConfig, *, core_factory: str | CoreFactory = DEFAULT_CORE_FACTORY
    ) -> None:
        self._config = config
        self._core_factory = core_factory
        self._core: Core | None = None
        self._inbox: queue.SimpleQueue[list[FromEngine]] = queue.SimpleQueue()
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, on_progress: OnProgress) -> dict[str, Any]:
        try:
            core, info = resolve_factory(self._core_factory)(self._config, on_progress)
        except CheckpointError as error:
            raise build_error(error) from error
        self._core = core
        self._spawn("sloraj-core", self._run_core, core)
        return info

    def _spawn(self, name: str, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run_core(self, core: Core) -> None:
        reason = "the engine was stopped"
        try:
            core.run(self._inbox.put)
        except BaseException as error:  # whatever ended the loop, its requests must hear of it
            reason = f"the engine failed: {type(error).__name__}: {error}"
        finally:
            self._is_over.set()
            self._inbox.put([Dead(reason=reason)])

    def listen(self, on_messages: OnMessages) -> None:
        self._spawn("sloraj-receiver", deliver, self._inbox.get, on_messages)

    def send(self, message: ToEngine) -> None:
        if self._core is None or self._is_over.is_set():
            raise EngineUnavailable("the engine is not running")
        self._core.submit(message)

    def stop(self) -> None:
        with contextlib.suppress(EngineUnavailable):  # never started, or over already
            self.send(Shutdown())
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(STOP_TIMEOUT_S)


def deliver(receive: Callable[[], list[FromEngine]], on_messages: OnMessages) -> None:
    """Body of a receiver thread: hand over batches up to and including the first `Dead`.

    Should handling one fail, which it never should, that is the end too: nobody may wait for ever.
    """
    try:
        is_over = False
        while not is_over:
            batch = receive()
            dead = next((n for n, m in enumerate(batch) if isinstance(m, Dead)), None)
            is_over = dead is not None
            on_messages(batch if dead is None else batch[: dead + 1])
    except Exception as error:
        _log.exception("the receiver fails")
        on_messages([Dead(reason=f"the receiver failed: {type(error).__name__}: {error}")])
