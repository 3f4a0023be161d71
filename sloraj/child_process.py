"""What processes that this one starts are given."""

from __future__ import annotations

import os
import sys


def child_environment() -> dict[str, str]:
    """The child imports what the parent can, whatever was done to the parent's path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
