"""Settings of JAX itself that an engine needs, made before the first use of a device."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax


def prepare_jax(compilation_cache_dir: str | None) -> None:
    """Settings that must precede the first use of a device; the environment's own win.

    Compiled programs are kept on disk unless `compilation_cache_dir` is empty: compiling is what a
    start on a GPU waits for.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    directory = compilation_cache_dir
    if directory is None:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", _default_cache_dir())
    if directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _default_cache_dir() -> str:
    """One directory a kind of processor: programs compiled for another may not run on this one,
    and home directories are shared between machines.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    kind = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return str(Path.home() / ".cache" / "sloraj" / f"jax-{platform.machine()}-{kind}")
