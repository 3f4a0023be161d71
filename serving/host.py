"""Starts, watches and stops the engine on behalf of the app; the state that readiness is read
from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from serving.bridge import Bridge
from serving.config import ServerConfig
from sloraj.errors import EngineUnavailable, SlorajError
from sloraj.frontend_api import EngineHealth, FrontendApi

log = logging.getLogger("serving")

EngineFactory = Callable[[], FrontendApi]


class EngineHost:
    """The engine's life as the server sees it: starting, ready, draining, dead.

    The engine starts on a thread of its own, so that the port opens at once and health can say
    "starting". `on_ready` and `on_failed` are called on that thread.
    """

    def __init__(self, engine: FrontendApi | EngineFactory, config: ServerConfig) -> None:
        self._source = engine
        self._config = config
        self._bridge: Bridge | None = None
        self._failure: BaseException | None = None
        self._is_stopped = False
        self._is_death_logged = False
        self._lock = threading.Lock()
        self.is_draining = False
        self.created = int(time.time())
        self.on_ready: Callable[[FrontendApi], None] = lambda _: None
        self.on_failed: Callable[[BaseException], None] = lambda _: None

    def start(self) -> None:
        if callable(self._source):
            threading.Thread(target=self._start, name="engine-start", daemon=True).start()
        else:
            self._install(self._source)

    def _start(self) -> None:
        assert callable(self._source)
        try:
            engine = self._source()
        except BaseException as exc:
            log.error(
                "the engine did not start: %s", exc, exc_info=not isinstance(exc, SlorajError)
            )
            self._failure = exc
            self.on_failed(exc)
            return
        self._install(engine)

    def _install(self, engine: FrontendApi) -> None:
        with self._lock:
            if self._is_stopped:  # stopped while it was starting
                engine.stop()
                return
            self._bridge = Bridge(engine)
        self.on_ready(engine)

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            bridge, self._bridge = self._bridge, None
        if bridge is not None:
            bridge.engine.stop()
            bridge.close()

    @property
    def num_generations(self) -> int:
        return self._bridge.num_generations if self._bridge else 0

    def fail_all(self, error: SlorajError) -> None:
        if self._bridge is not None:
            self._bridge.fail_all(error)

    def bridge(self) -> Bridge:
        """The way to a live engine. Raises EngineUnavailable while there is none."""
        health = self.health()
        if self._bridge is None or health.state in ("starting", "dead"):
            raise EngineUnavailable(f"the engine is {health.state}: {health.detail}".rstrip(": "))
        return self._bridge

    def bridge_for_new_work(self) -> Bridge:
        """As `bridge`, and raises EngineUnavailable while draining."""
        bridge = self.bridge()
        if self.is_draining or bridge.engine.health().state == "draining":
            raise EngineUnavailable("the server is shutting down and takes no new requests")
        return bridge

    def health(self) -> EngineHealth:
        if self._failure is not None:
            return EngineHealth(
                state="dead", heartbeat_age_s=0.0, detail=f"did not start: {self._failure}"
            )
        if self._bridge is None:
            state = "dead" if self._is_stopped else "starting"
            return EngineHealth(state=state, heartbeat_age_s=0.0)
        health = self._bridge.engine.health()
        if health.state == "dead" and not self._is_death_logged:
            self._is_death_logged = True
            log.error("the engine is dead: %s", health.detail)
        return health

    def unhealthy_reason(self) -> str | None:
        """Why this server cannot serve; None while it can. A silent engine counts only with work to
        do.
        """
        health = self.health()
        if health.state == "starting":
            return "starting"
        if health.state == "dead":
            return f"the engine is dead: {health.detail}".rstrip(": ")
        if self.num_generations and health.heartbeat_age_s > self._config.heartbeat_timeout_s:
            return (
                f"the engine has work and has been silent for {health.heartbeat_age_s:.1f} s "
                f"(limit {self._config.heartbeat_timeout_s:g} s)"
            )
        return None

    def unready_reason(self) -> str | None:
        """Why new requests should go elsewhere; None while they are welcome."""
        reason = self.unhealthy_reason()
        if reason is None and (self.is_draining or self.health().state == "draining"):
            return "draining"
        return reason
