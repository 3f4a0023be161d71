"""A simulated engine: what describes a real one, and a core made from it without a device.

An `EngineDescription` holds all that host code and cost model need to know of a real engine. It
is written into every recorded run, so that the very same engine is simulated. Adapters have
names, sizes and ranks, and no weights: their pages are one number, seen as an array of full size.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from bench.clock import Clock
from bench.settings import SETTINGS
from bench.simulator.device_model import DeviceModel
from bench.simulator.runner import SimulatedRunner
from checkpoints.model_config import TARGET_MODULES, ModelConfig
from sloraj.adapters.layout import KIND_LORA, SEGMENT_FIELDS, num_adapter_pages, pool_dtype
from sloraj.batch import PackedAdapter
from sloraj.config import PoolLayout, SchedulerConfig
from sloraj.core import EngineCore
from sloraj.runner.buckets import Buckets

ATTENTION = SETTINGS["S1"].modules  # what benchmarks adapt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineDescription:
    """The resolved numbers of an engine. `as_dict` and `of` are for files."""

    geometry: str
    model: ModelConfig
    layout: PoolLayout
    scheduler: SchedulerConfig
    buckets: Buckets

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    @classmethod
    def of(cls, found: dict[str, Any]) -> EngineDescription:
        """Raises msgspec.ValidationError naming the field that is not as it has to be."""
        return msgspec.convert(found, cls)


class AdapterSizes:
    """Makes adapters of given ranks: the right number of pages, and no weights in them."""

    def __init__(
        self, model: ModelConfig, layout: PoolLayout, modules: Sequence[str] = ATTENTION
    ) -> None:
        self._model, self._layout, self._modules = model, layout, modules
        self._packed: dict[int, PackedAdapter] = {}

    def packed(self, version_id: str, rank: int) -> PackedAdapter:
        """One adapter; those of a rank share their arrays."""
        if rank not in self._packed:
            self._packed[rank] = self._of_rank(rank)
        return dataclasses.replace(self._packed[rank], version_id=version_id)

    def _of_rank(self, rank: int) -> PackedAdapter:
        layout, num_layers = self._layout, self._layout.num_layers
        ranks = {(layer, m): rank for layer in range(num_layers) for m in self._modules}
        num_pages = num_adapter_pages(ranks, layout, self._model)
        shape = (num_pages, num_layers, layout.tp * layout.page_elems)
        segments = np.zeros((num_layers, len(TARGET_MODULES), SEGMENT_FIELDS), np.int32)
        for module in self._modules:
            segments[:, TARGET_MODULES.index(module)] = (KIND_LORA, 0, 0, rank)
        pages = np.broadcast_to(np.zeros((), pool_dtype(layout)), shape)
        return PackedAdapter("", pages, segments, rank)


class InlineExecutor(concurrent.futures.Executor):
    """Runs what is submitted at once, in the caller's thread: loading takes no simulated time."""

    def submit(
        self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def simulated_core(
    description: EngineDescription,
    model: DeviceModel,
    clock: Clock,
    *,
    executor: concurrent.futures.Executor | None = None,
    sizes: AdapterSizes | None = None,
) -> EngineCore:
    """A core whose steps pass on `clock`. It loads an adapter of rank R from the path
    "random:R:NAME", as `bench.random_adapters` does; `executor` decides when a load has ended.
    """
    made = sizes or AdapterSizes(description.model, description.layout)

    def load(path: str) -> tuple[PackedAdapter, dict[str, Any]]:
        _, rank, _ = path.split(":")
        return made.packed(path, int(rank)), {}

    eos = description.scheduler.eos_token_ids
    token_id = next(token for token in range(len(eos) + 1) if token not in eos)
    runner = SimulatedRunner(
        description.buckets, description.model, model, clock, token_id=token_id
    )
    return EngineCore(
        description.scheduler, runner, load, clock=clock.now,
        loader_executor=executor or InlineExecutor(),
    )  # fmt: skip


def register(core: EngineCore, ranks: Iterable[int]) -> None:
    """Load adapters "adapter-0", "adapter-1", ... of these ranks."""
    adapters = [(f"adapter-{i}", f"random:{rank}:{i}") for i, rank in enumerate(ranks)]
    core.preload(adapters, lambda done: None)
