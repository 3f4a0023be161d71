"""Where a step's time goes, kernel by kernel, from a profiler trace."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

# The first pattern found in a kernel's name decides; what matches none is elementwise work of XLA.
GROUPS = (
    ("lora_shrink", ("lora_shrink",)),
    ("lora_expand", ("lora_expand",)),
    ("lora_rows", ("lora_rows",)),
    ("attention", ("paged_decode_attention", "paged_ragged_attention")),
    ("rope_write", ("rope_write",)),
    ("add_rms_norm", ("add_rms_norm",)),
    ("matmul", ("gemm", "cublas", "cutlass", "nvjet", "xmma", "linear", "dot", "splitk")),
    ("copies", ("memcpy", "memset", "copy")),
)


def group_of(kernel: str) -> str:
    """The part of the step that a kernel belongs to."""
    name = kernel.lower()
    return next((group for group, parts in GROUPS if any(p in name for p in parts)), "elementwise")


def profile(run: Callable[[], Any], num_steps: int) -> dict[str, Any]:
    """Microseconds and kernels a step by group, and the 25 dearest kernels, of `run()`.

    The profiler runs a program kernel by kernel, not as a graph: the durations are right, the
    gaps between them are not.
    """
    durations: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    for _, event in stream_events(run):
        durations[event.name] += event.duration_ns
        counts[event.name] += 1
    groups: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"us": 0.0, "kernels": 0})
    for name, total_ns in durations.items():
        groups[group_of(name)]["us"] += total_ns / 1e3 / num_steps
        groups[group_of(name)]["kernels"] += counts[name] / num_steps
    dearest = sorted(durations, key=lambda name: -durations[name])[:25]
    return {
        "groups": dict(groups),
        "kernels": {
            name: {
                "us": durations[name] / 1e3 / num_steps,
                "calls": counts[name] / num_steps,
            }
            for name in dearest
        },
    }


def module_seconds(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of kernels in each program (`jit_` and the function's name) during `run()`.

    A kernel's own time, as `profile` counts it: whatever outputs a program has, and however long
    the host takes to start it.
    """
    return {name: sum(kernels) for name, kernels in module_kernels(run).items()}


def module_kernels(run: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each program's kernels during `run()`, in their order."""
    events: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for _, event in stream_events(run):
        module = next((value for name, value in event.stats if name == "hlo_module"), None)
        if module is not None:
            events[str(module)].append((event.start_ns, event.duration_ns / 1e9))
    return {name: [seconds for _, seconds in sorted(found)] for name, found in events.items()}


def seconds_of_runs(kernels: Sequence[float], num_runs: int) -> list[float]:
    """Seconds of each of a program's runs, which are alike in their kernels.

    Raises ValueError if the kernels are not those of so many equal runs.
    """
    size, rest = divmod(len(kernels), num_runs)
    if rest or not size:
        raise ValueError(f"{len(kernels)} kernels, allowed: a multiple of {num_runs} runs")
    return [sum(kernels[i * size : (i + 1) * size]) for i in range(num_runs)]


def stream_events(run: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """(stream, event) of all that the first device did during `run()`, from a profiler trace.

    Events have a `name`, `start_ns` and `duration_ns`; a stream's name says what kind it is.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (path,) = Path(directory).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        for plane in planes:
            if plane.name != "/device:GPU:0":
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield line.name, event
