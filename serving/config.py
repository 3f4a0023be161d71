"""Frozen settings of the server. Every field is also a command-line flag
(`serving/cli_options.py`).
"""

from __future__ import annotations

import dataclasses

from sloraj.errors import ConfigError

MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server listens, whom it lets in, and how much of anything it accepts."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    api_key: str | None = None  # needed for everything but health, readiness and metrics
    admin_api_key: str | None = None  # needed to load and unload; None: the api_key will do
    adapter_root: tuple[
        str, ...
    ] = ()  # adapters may be loaded from these; empty: adapters_dir only
    tenant_from: str = "adapter"  # whose account: "adapter", "user" (field), "header"
    chat_template: str | None = None  # file; None: the model's own
    chat_template_timeout_s: float = 10.0
    shutdown_timeout: float = 30.0  # seconds that running requests get after SIGTERM
    request_timeout_s: float | None = None  # from arrival to last token; None: no limit
    heartbeat_timeout_s: float = 10.0  # an engine silent for longer, with work to do, is unhealthy
    max_body_bytes: int = 8 * MIB
    body_timeout_s: float = 20.0  # for the whole body to arrive
    max_header_bytes: int = 64 * 1024
    max_headers: int = 256
    max_prompts: int = 256  # prompts in one completion request
    max_buffered_events: int = 1024  # of each choice, that wait for a slow reader before it is cut
    send_timeout_s: float = 30.0  # one write to a slow reader
    sse_keep_alive_s: float = 0.0  # 0: no comments (some clients cannot read them)
    vllm_metrics: bool = True  # also expose the five vllm: names that routers read
    log_level: str = "info"

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ConfigError(
                    f"{name}: got {getattr(self, name)!r}, allowed: {allowed}", param=name
                )

        require(0 <= self.port <= 65535, "port", "0 to 65535")
        for name in (
            "chat_template_timeout_s",
            "heartbeat_timeout_s",
            "body_timeout_s",
            "send_timeout_s",
        ):
            require(getattr(self, name) > 0, name, "above 0")
        for name in ("max_body_bytes", "max_header_bytes", "max_headers", "max_prompts",
                     "max_buffered_events"):  # fmt: skip
            require(getattr(self, name) >= 1, name, "1 and up")
        require(self.shutdown_timeout >= 0, "shutdown_timeout", "0 and up")
        require(self.sse_keep_alive_s >= 0, "sse_keep_alive_s", "0 (off) and up")
        require(
            self.request_timeout_s is None or self.request_timeout_s > 0,
            "request_timeout_s",
            "above 0",
        )
        sources = ("adapter", "user", "header")
        require(self.tenant_from in sources, "tenant_from", ", ".join(sources))
        levels = ("debug", "info", "warning", "error")
        require(self.log_level in levels, "log_level", ", ".join(levels))
        for name in ("api_key", "admin_api_key"):
            key = getattr(self, name)
            is_sendable = key is None or (key.isascii() and key.isprintable() and " " not in key)
            require(key != "" and is_sendable, name, "printable ASCII without spaces, not empty")
