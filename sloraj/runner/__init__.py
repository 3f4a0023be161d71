"""The runner owns every device array, every compiled program, and every host<->device copy."""

from sloraj.runner.runner import DeviceRunner

__all__ = ["DeviceRunner"]
