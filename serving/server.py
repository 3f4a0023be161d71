"""Runs the app under uvicorn: binds the port, prints when it is ready, drains on SIGTERM, then
ends.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn

from serving.app import create_app
from serving.config import ServerConfig
from serving.connections import Connection
from serving.host import EngineFactory, EngineHost
from serving.sampling_fields import SAMPLING_DEFAULTS
from sloraj.errors import ConfigError, EngineUnavailable, SlorajError
from sloraj.frontend_api import FrontendApi

log = logging.getLogger("serving")

BACKLOG = 2048
KEEP_ALIVE_S = 65  # an idle connection; longer than load balancers keep theirs
GRACE_S = 5.0  # for connections to close once their last answer is sent


def bind(config: ServerConfig) -> socket.socket:
    """A bound socket. Raises ConfigError naming the address.

    The kernel is told to drop peers that take no bytes for twice as long as one of our writes may
    last, so that a reader that stopped reading does not hold its connection for ever.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            limit_ms = int(config.send_timeout_s * 2000)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
        bound.bind((config.host, config.port))
    except OSError as exc:
        bound.close()
        raise ConfigError(
            f"port: cannot listen on {config.host}:{config.port} ({exc.strerror}); "
            "choose another with --port",
            param="port",
        ) from exc
    return bound


class Server(uvicorn.Server):
    """First SIGTERM or SIGINT: not ready, no new work, running requests get `shutdown_timeout`,
    then an error. Second signal: now. `exit_code` is 0 unless the engine never started.
    """

    def __init__(self, config: uvicorn.Config, host: EngineHost, shutdown_timeout_s: float) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._host = host
        self._shutdown_timeout_s = shutdown_timeout_s
        self._drain_deadline_s: float | None = None
        host.on_failed = self._on_failed

    def _on_failed(self, _: BaseException) -> None:
        """The host has logged why."""
        self.exit_code = 1
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs between two bytecodes of the main thread: sets flags only."""
        if self._drain_deadline_s is not None:
            self.should_exit = self.force_exit = True
            return
        self._host.is_draining = True
        self._drain_deadline_s = time.monotonic() + self._shutdown_timeout_s

    async def on_tick(self, counter: int) -> bool:
        if self._drain_deadline_s is not None and not self.should_exit:
            if self._host.num_generations == 0:
                self.should_exit = True
            elif time.monotonic() >= self._drain_deadline_s:
                self._host.fail_all(EngineUnavailable("the server was shut down"))
                self.should_exit = True
        return await super().on_tick(counter)


def serve(
    engine: FrontendApi | EngineFactory,
    config: ServerConfig,
    *,
    default_roots: Sequence[str] = (),
    max_adapter_slots: int | None = None,
) -> int:
    """Serve until a signal; returns the exit status. Raises ConfigError when the port is taken."""
    app = create_app(
        engine, config, default_roots=default_roots, max_adapter_slots=max_adapter_slots
    )
    host: EngineHost = app.state.server.host
    _warn_if_open(config)
    bound = bind(config)
    port = bound.getsockname()[1]
    log.info("listening on port %d; GET /ready answers 200 once the engine has started", port)
    host.on_ready = lambda ready: _announce(ready, config.host, port, has_key=bool(config.api_key))
    server = Server(
        uvicorn.Config(
            app,
            http=Connection,
            timeout_keep_alive=KEEP_ALIVE_S,
            ws="none",
            backlog=BACKLOG,
            log_level=config.log_level,
            access_log=config.log_level == "debug",
            server_header=False,
            h11_max_incomplete_event_size=config.max_header_bytes,
            timeout_graceful_shutdown=int(GRACE_S),
        ),
        host,
        config.shutdown_timeout,
    )
    try:
        server.run(sockets=[bound])
    finally:
        host.stop()  # a second signal skips the lifespan's end
        bound.close()
    return server.exit_code


def _announce(engine: FrontendApi, address: str, port: int, *, has_key: bool) -> None:
    """One line that says what is served, and one to paste."""
    info = engine.info
    try:
        adapters = engine.list_adapters().result()
    except SlorajError as exc:
        log.error("the engine started and then failed: %s", exc)
        return
    shown = f"[{address}]" if ":" in address else address
    url = f"http://{shown}:{port}"
    model = adapters[0].adapter_id if adapters else info.model_id
    key = " -H 'Authorization: Bearer '$API_KEY" if has_key else ""
    print(
        f"ready: {url} serves {info.model_id!r} and {len(adapters)} adapters on {info.device} "
        f"({info.dtype}, kernels {info.kernels}, context {info.max_model_len}, "
        f"{info.num_pages} pages, started in {info.startup_s:.1f} s)\n"
        f"try: curl {url}/v1/completions -H 'Content-Type: application/json'{key} "
        f"""-d '{{"model": "{model}", "prompt": "Hello", "max_tokens": 16}}'""",
        flush=True,
    )
    defaults = {k: v for k, v in info.generation_defaults.items() if k in SAMPLING_DEFAULTS}
    if defaults:
        pairs = ", ".join(f"{name} {value}" for name, value in defaults.items())
        print(f"where a request gives none, this model's defaults: {pairs}", flush=True)


def _warn_if_open(config: ServerConfig) -> None:
    try:
        is_local = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        is_local = config.host == "localhost"
    if not is_local and config.api_key is None:
        print(
            f"warning: {config.host} is reachable by others and no --api-key is set: anyone may "
            "use this server and load adapters",
            file=sys.stderr,
            flush=True,
        )
