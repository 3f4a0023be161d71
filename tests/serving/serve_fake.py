"""Serves the fake engine from a process of its own: `python serve_fake.py DELAY_S TIMEOUT_S
START_S`.

Prints what the real command prints; ends as it ends.
"""

import sys
import time

from serving.config import ServerConfig
from serving.server import serve
from tests.serving.fake_engine import FakeEngine

delay_s, timeout_s, start_s = map(float, sys.argv[1:])


def start() -> FakeEngine:
    time.sleep(start_s)
    return FakeEngine(token_delay_s=delay_s)


sys.exit(serve(start, ServerConfig(port=0, shutdown_timeout=timeout_s)))
