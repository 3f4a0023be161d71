"""What it costs to bring adapter pages to the device, idle and beside decode steps.

    python -m bench.transfers --geometry llama-7b --out bench/results/.../transfers.json

Pages lie in host memory in three ways: `numpy` (pageable), `mapped` (numpy memory registered with
the driver once) and `pinned_host` (arrays of that memory kind). Per way and size: the rate of one
transfer waited for, of four in flight, the host time of a call, and the rate at which such memory
is filled. Then real install programs run before steps that read as many bytes as a decode step:
`serial` sends pages just before the program that needs them, `ahead` one step earlier.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from bench.geometries import GEOMETRIES
from bench.record import command, commit, record
from bench.summary import target
from sloraj.parallel.mesh import make_mesh
from sloraj.runner import programs
from sloraj.runner.state import POOL_SPEC, STAGING_SPEC

PAGE_SIZE = 16
KINDS = ("numpy", "mapped", "pinned_host")
Array = Any


def page_shape(geometry: str) -> tuple[int, int]:
    """[layers, elements] of one page over all layers."""
    g = GEOMETRIES[geometry]
    head_dim = g["hidden_size"] // g["num_attention_heads"]
    return g["num_hidden_layers"], 2 * PAGE_SIZE * g["num_key_value_heads"] * head_dim


class HostPages:
    """`count` blocks of `[pages, layers, elements]` in host memory of one kind."""

    def __init__(self, kind: str, shape: tuple[int, ...], count: int) -> None:
        self.kind, self.device = kind, jax.devices()[0]
        source = np.ones(shape, ml_dtypes.bfloat16)
        self.num_bytes = source.nbytes
        started = time.perf_counter()
        self._mapped: np.ndarray | None = None
        if kind == "pinned_host":
            pinned = SingleDeviceSharding(self.device, memory_kind="pinned_host")
            self.blocks: list[Array] = [jax.device_put(source, pinned) for _ in range(count)]
            jax.block_until_ready(self.blocks)
        else:
            arena = np.empty((count, *shape), ml_dtypes.bfloat16)
            if kind == "mapped":
                self.device.client.dma_map(arena.ctypes.data, arena.nbytes)
                self._mapped = arena
            self.blocks = list(arena)
            for block in self.blocks:
                np.copyto(block, source)
        self.first_fill_s = time.perf_counter() - started
        started = time.perf_counter()
        if kind == "pinned_host":
            for i in range(count):
                self.blocks[i] = None
                self.blocks[i] = jax.device_put(source, pinned)
            jax.block_until_ready(self.blocks)
        else:
            for block in self.blocks:
                np.copyto(block, source)
        self.refill_s = time.perf_counter() - started

    def send(self, index: int, sharding: Any) -> jax.Array:
        sent: jax.Array = jax.device_put(self.blocks[index % len(self.blocks)], sharding)
        return sent

    def close(self) -> None:
        if self._mapped is not None:
            self.device.client.dma_unmap(self._mapped.ctypes.data)


def median_s(run: Callable[[], Any], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def idle_rates(pages: HostPages, sharding: Any) -> dict[str, float]:
    """GB/s of one transfer and of four in flight; microseconds of a call."""
    one_s = median_s(lambda: pages.send(0, sharding))
    four_s = median_s(lambda: [pages.send(i, sharding) for i in range(4)])
    calls = []
    for i in range(4):
        started = time.perf_counter()
        sent = pages.send(i, sharding)
        calls.append(time.perf_counter() - started)
        sent.block_until_ready()
    total = pages.num_bytes * len(pages.blocks)
    return {
        "one_gb_s": pages.num_bytes / one_s / 1e9,
        "four_gb_s": 4 * pages.num_bytes / four_s / 1e9,
        "call_us": float(np.median(calls)) * 1e6,
        "first_fill_gb_s": total / pages.first_fill_s / 1e9,
        "refill_gb_s": total / pages.refill_s / 1e9,
    }


class Decode:
    """Steps that read the base weights' bytes, and the pools that installs write."""

    def __init__(self, geometry: str, mesh: Mesh, num_pages: int) -> None:
        layers, elements = page_shape(geometry)
        g = GEOMETRIES[geometry]
        width = 4 * g["hidden_size"] + 3 * g["intermediate_size"]  # as many bytes as a layer has
        make = jax.jit(lambda: jnp.ones((width, g["hidden_size"]), jnp.bfloat16))
        self._weights = [make() for _ in range(layers)]
        pool = jax.jit(
            lambda: jnp.zeros((num_pages, elements), jnp.bfloat16),
            out_shardings=NamedSharding(mesh, POOL_SPEC),
        )
        self.pools = [pool() for _ in range(layers)]
        self._x = self._before = jnp.ones((64, g["hidden_size"]), jnp.bfloat16)
        self._step = jax.jit(self._run)
        self._install = programs.install_program(mesh)

    @staticmethod
    def _run(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for w in weights:
            y = jnp.einsum("td,nd->tn", x, w, preferred_element_type=jnp.bfloat16)
            x = x + y[:, : x.shape[1]] * jnp.bfloat16(1e-6)
        return x

    def step(self) -> None:
        self._x = self._step(self._x, self._weights)

    def install(self, staging: jax.Array, first_page: int) -> None:
        size = staging.shape[0]
        places = np.arange(first_page, first_page + size, dtype=np.int32)
        self.pools = self._install(self.pools, staging, places)

    def wait_for_last_but_one(self) -> None:
        """One step behind, as the engine reads."""
        self._before.block_until_ready()
        self._before = self._x

    def wait(self) -> None:
        jax.block_until_ready((self._x, self.pools))


def beside_decode(
    decode: Decode, pages: HostPages | None, sharding: Any, order: str, num_steps: int = 40
) -> float:
    """Seconds a step, with one block sent and installed in each (None: none)."""

    def run(n: int) -> None:
        waiting: jax.Array | None = None
        for i in range(n):
            if pages is not None:
                if order == "ahead":
                    if waiting is not None:
                        decode.install(waiting, 1)
                    waiting = pages.send(i, sharding)
                else:
                    decode.install(pages.send(i, sharding), 1)
            decode.step()
            decode.wait_for_last_but_one()
        decode.wait()

    run(4)
    started = time.perf_counter()
    run(num_steps)
    return (time.perf_counter() - started) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-7b")
    parser.add_argument("--pages", default="1,2,8,16", help="pages of a block")
    parser.add_argument("--num-pages", type=int, default=500)
    parser.add_argument("--commit", help="where the tree is not a repository")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mesh = make_mesh(1)
    staging = NamedSharding(mesh, STAGING_SPEC)
    decode = Decode(args.geometry, mesh, args.num_pages)
    base_s = beside_decode(decode, None, staging, "")
    result: dict[str, Any] = {
        "bench": "transfers", "device": jax.devices()[0].device_kind,
        "commit": args.commit or commit(), "command": command(),
        "jax": jax.__version__, "geometry": args.geometry,
        "step_ms": base_s * 1e3, "rows": [],
    }  # fmt: skip
    for size in map(int, args.pages.split(",")):
        for kind in KINDS:
            row: dict[str, Any] = {"pages": size, "kind": kind}
            try:
                pages = HostPages(kind, (size, *page_shape(args.geometry)), 6)
                row["mb"] = pages.num_bytes / 1e6
                row |= idle_rates(pages, staging)
                for order in ("serial", "ahead"):
                    step_s = beside_decode(decode, pages, staging, order)
                    row[f"{order}_added_ms"] = (step_s - base_s) * 1e3
                install_s = _install_seconds(decode, pages.send(0, staging))
                row["install_ms"] = install_s * 1e3
                pages.close()
            except Exception as error:
                row["error"] = str(error).splitlines()[0][:200]
            result["rows"].append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    result["targets"] = _targets(result["rows"])
    record(result, args.out)


def _targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the memory that the engine uses; two pages are a rank-8 adapter of a Llama-7B."""
    wanted = (
        ("one_gb_s", "one rank-8 adapter to the idle device", 20),
        ("four_gb_s", "four rank-8 adapters in flight to the idle device", 40),
        ("refill_gb_s", "host memory filled, once registered", 5),
    )
    return [
        target("11", name, measured=row[field], limit=limit, unit="GB/s", is_minimum=True)
        for row in rows
        if row["kind"] == "mapped" and row["pages"] == 2 and "error" not in row
        for field, name, limit in wanted
    ]


def _install_seconds(decode: Decode, staging: jax.Array, repeats: int = 50) -> float:
    """Device seconds of one install program, run back to back."""
    decode.install(staging, 1)
    decode.wait()
    started = time.perf_counter()
    for _ in range(repeats):
        decode.install(staging, 1)
    decode.wait()
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    main()
