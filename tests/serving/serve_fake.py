"""Serves the fake engine from a process of its own: `python serve_fake.py DELAY_S TIMEOUT_S
START_S`; a negative START_S
makes the start fail.

Prints what the real command prints; ends as it ends.
"""

import sys
import time

from serving.config import ServerConfig
from serving.server import serve
from sloraj.errors import ConfigError
from tests.serving.fake_engine import FakeEngine

delay_s, timeout_s, start_s = map(float, sys.argv[1:])


def start() -> FakeEngine:
    if start_s < 0:
        raise ConfigError("model: got '/x', allowed: a directory with config.json", param="model")
    time.sleep(start_s)
    return FakeEngine(token_delay_s=delay_s)


sys.exit(serve(start, ServerConfig(port=0, shutdown_timeout=timeout_s)))
