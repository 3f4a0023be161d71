"""One started engine, and any number of cores on its runner: what the points of a sweep run on.

A core starts from nothing (no adapter on the device, an empty queue), and the device needs no reset
between two. So a point gets its own pages, split and policies without a start of its own; a cap of
device memory is a core that is given fewer pages than the runner has.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.adapter_files import write_adapters
from bench.geometries import write_geometry
from bench.point_setup import capped_pool_bytes, core_config
from bench.points import EngineSpec, Point
from bench.random_adapters import random_adapter_loader, random_path
from bench.replay import default_adapter_name
from bench.settings import SETTINGS
from bench.simulator.geometry import page_bytes
from checkpoints.demo import MODEL_DIR
from checkpoints.hf_config import read_model_config
from checkpoints.model_config import ModelConfig
from sloraj.adapters.layout import Allocate
from sloraj.adapters.loader import NUM_THREADS
from sloraj.batch import PackedAdapter
from sloraj.build import build_core
from sloraj.config import EngineConfig, PoolLayout
from sloraj.core import EngineCore
from sloraj.runner import DeviceRunner

Loaded = tuple[PackedAdapter, dict[str, Any]]


class SweepEngine:
    """The engine of a spec, started, and the adapters in host memory that points share."""

    def __init__(
        self,
        spec: EngineSpec,
        scratch: Path,
        *,
        cache_dir: str | None = None,
        on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> None:
        """scratch: an empty folder for files that the engine starts from."""
        self.spec = spec
        self._loaders: dict[bool, Callable[[str], Loaded]] = {}
        self._packed: dict[tuple[str, bool], Loaded] = {}
        self._executor = ThreadPoolExecutor(NUM_THREADS)
        started = time.perf_counter()
        is_demo = spec.geometry == "demo"
        model = str(MODEL_DIR) if is_demo else write_geometry(spec.geometry, scratch / "model")
        self.model = read_model_config(model)
        merged = None
        if spec.merged_rank is not None:
            merged = write_adapters(scratch, self.model, [spec.merged_rank], 1)[0]
        self._engine_config = EngineConfig(
            model=model, served_model_name=spec.geometry, random_weights=not is_demo,
            merged_adapter=merged, kernels=spec.kernels, pool_bytes=spec.pool_bytes,
            max_num_seqs=spec.max_num_seqs, max_num_batched_tokens=spec.max_num_batched_tokens,
            max_rank=spec.max_rank, max_adapter_slots=spec.max_adapter_slots,
            max_model_len=spec.max_model_len, max_num_waiting=1 << 20, loader_processes=0,
            compilation_cache_dir=cache_dir,
        )  # fmt: skip
        core, self.info = build_core(
            self._engine_config, on_progress, make_loader=self._make_loader
        )
        assert isinstance(core._runner, DeviceRunner)
        self._runner, self._config = core._runner, core._config
        self.startup_s = time.perf_counter() - started

    def _make_loader(
        self, model: ModelConfig, layout: PoolLayout, max_rank: int, allocate: Allocate
    ) -> Callable[[str], Loaded]:
        self.page_bytes = page_bytes(layout)
        for is_padded in (False, True):
            padded = dataclasses.replace(layout, padded_rank=max_rank if is_padded else None)
            self._loaders[is_padded] = random_adapter_loader(model, padded, max_rank, allocate)
        return self._loaders[False]

    @property
    def device(self) -> str:
        return str(self.info["device"])

    def num_pages(self, point: Point) -> int:
        """Of the pool that the point's core is given, the null page included."""
        if point.pool_pages is not None:
            wanted = point.pool_pages
        elif point.pool_gb is not None:
            wanted = capped_pool_bytes(self.model, point.pool_gb) // self.page_bytes
        else:
            return self._config.num_pages
        if wanted > self._config.num_pages:
            raise ValueError(
                f"{point.pool}: got {wanted} pages, allowed: at most the device's "
                f"{self._config.num_pages}"
            )
        return wanted

    def core(self, point: Point) -> EngineCore:
        """A new core as the point wants it, with its adapters registered and none on the device."""
        gc.collect()  # of the core before: it holds adapters
        self._runner._staged.clear()  # what it sent and never installed; tags start anew
        num_pages = self.num_pages(point)
        config = core_config(self._config, self._engine_config, point, num_pages)
        adapters = adapter_paths(point)
        wanted = {(path, point.pad_ranks) for _, path in adapters}
        self._packed = {key: value for key, value in self._packed.items() if key in wanted}
        core = EngineCore(
            config, self._runner, lambda path: self._load(path, point.pad_ranks),
            loader_executor=self._executor,
        )  # fmt: skip
        core.preload(adapters, lambda done: None)
        gc.collect()  # now, and not in a step
        return core

    def _load(self, path: str, is_padded: bool) -> Loaded:
        """From several threads at once, but never twice for one path."""
        key = (path, is_padded)
        if key not in self._packed:
            self._packed[key] = self._loaders[is_padded](path)
        return self._packed[key]

    def close(self) -> None:
        self._executor.shutdown()


def adapter_paths(point: Point) -> list[tuple[str, str]]:
    """(name, path) of the point's adapters."""
    setting = SETTINGS[point.setting]
    return [
        (default_adapter_name(i), random_path(setting.adapter_rank(i), i, point.modules))
        for i in range(point.num_adapters)
    ]
