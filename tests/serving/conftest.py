"""A fake engine, an in-process client, and a real server on a free port of 127.0.0.1."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from serving.app import create_app
from serving.config import ServerConfig
from serving.connections import Connection
from tests.serving.fake_engine import FakeEngine

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'raise' %}"
    "{{ raise_exception('no system here') }}{% endif %}"
    "{% if m.content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}"
    "{% if m.content == 'escape' %}{{ ''.__class__.__mro__ }}{% endif %}"
    "<user>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@dataclasses.dataclass
class LiveServer:
    port: int
    engine: FakeEngine
    app: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def wait_until(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.002)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "fake-base"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def adapters_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


def write_adapter(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    return path


@pytest.fixture
def engine(model_dir: Path) -> Iterator[FakeEngine]:
    engine = FakeEngine(model_path=str(model_dir))
    engine.add_adapter("shift-1")
    engine.add_adapter("team/shift-2")
    yield engine
    engine.stop()


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig()


@pytest.fixture
def client(engine: FakeEngine, config: ServerConfig, adapters_dir: Path) -> Iterator[TestClient]:
    app = create_app(engine, config, default_roots=[str(adapters_dir)])
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def live(engine: FakeEngine, config: ServerConfig, adapters_dir: Path) -> Iterator[LiveServer]:
    app = create_app(engine, config, default_roots=[str(adapters_dir)])
    server = uvicorn.Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="warning", http=Connection, ws="none"
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield LiveServer(server.servers[0].sockets[0].getsockname()[1], engine, app)
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
