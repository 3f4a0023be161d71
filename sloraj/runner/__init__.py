"""The runner owns every device array, every compiled program, and every host<->device copy.

`DeviceRunner` is imported when it is asked for: a simulator needs the buckets, and no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sloraj.runner.runner import DeviceRunner

__all__ = ["DeviceRunner"]


def __getattr__(name: str) -> Any:
    if name != "DeviceRunner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sloraj.runner.runner import DeviceRunner

    return DeviceRunner
