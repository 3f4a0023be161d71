"""Drives an EngineCore over the real runner by hand: one runner, warm, and many cores on it.

A core starts from nothing, and the device state needs no reset between two: rows are reset when
they are assigned, slots when they are bound. So each law gets its own core, pool size and token
budget, and nothing is compiled again.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from checkpoints.model_config import TARGET_MODULES, ModelConfig
from sloraj.adapters.layout import Allocate
from sloraj.adapters.loader import LoadFunction
from sloraj.adapters.reader import adapter_loader
from sloraj.build import LORA_VARIANTS, build_core
from sloraj.config import EngineConfig, PoolLayout, SchedulerConfig
from sloraj.core import EngineCore
from sloraj.messages import (
    Abort,
)
from sloraj.request import SamplingParams
from sloraj.runner import DeviceRunner
from tests.checkpoints.fixtures import tiny_config, write_adapter, write_hf_model
from tests.e2e.driver import quiet
from tests.e2e.token_oracle import Adapter, TokenOracle
from tests.sloraj.conversation import Conversation

PAGE_SIZE = 4
MAX_RANK = 8
NUM_PAGES = 4096  # on the device; a core is given as few of them as its law wants
MAX_NUM_SEQS = 10  # no power of two, and more than one reset program or sample bucket takes
MAX_NUM_TOKENS = 32
EOS = 2

# targets, rank by module, layers; what is not said is drawn from the index
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"targets": ("q_proj", "v_proj"), "ranks": 4},
    {"targets": TARGET_MODULES, "ranks": 2},
    {"targets": ("o_proj",), "ranks": 1, "rslora": True},
    {"targets": ("k_proj", "down_proj"), "ranks": {"k_proj": 3, "down_proj": 8}},
    {"targets": ("gate_proj", "up_proj"), "ranks": 5, "layers": [1]},
    {"targets": ("q_proj", "k_proj", "v_proj", "o_proj"), "ranks": 3, "rslora": True},
    {"targets": ("down_proj",), "ranks": 6, "layers": [0]},
    {"targets": ("v_proj", "up_proj"), "ranks": 2, "alpha": 8},
)
ZERO_B = len(ADAPTERS)  # every B is zero: the base model's answers


@dataclasses.dataclass(frozen=True)
class Engine:
    """A warm runner with the files it serves and the oracle of what it must answer."""

    runner: DeviceRunner
    config: SchedulerConfig
    model_config: ModelConfig
    load: LoadFunction
    oracle: TokenOracle
    adapters: tuple[Adapter, ...]


def write_adapters(directory: Path, config: ModelConfig) -> tuple[Adapter, ...]:
    found = []
    for index, fields in enumerate((*ADAPTERS, ADAPTERS[1] | {"magnitude": 0.0})):
        path = directory / f"adapter{index}"
        modules = write_adapter(path, config, seed=100 + index, **fields)
        found.append(Adapter(str(path), modules))
    return tuple(found)


def build_engine(directory: Path) -> Engine:
    """Write a model and adapters, and warm up a checked runner for them."""
    written = tiny_config(eos_token_ids=(EOS,))
    weights = write_hf_model(directory / "base", written, seed=7)
    adapters = write_adapters(directory, written)
    oracle = TokenOracle(written, weights)  # before readiness: it compiles the noise
    loads: list[LoadFunction] = []

    def keep_loader(
        model: ModelConfig, layout: PoolLayout, max_rank: int, allocate: Allocate
    ) -> LoadFunction:
        loads.append(adapter_loader(model, layout, max_rank, allocate))
        return loads[0]

    page_bytes = written.num_layers * 2 * PAGE_SIZE * written.num_kv_heads * written.head_dim * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sloraj.runner.buckets.MIN_MIXED_TOKENS", MAX_NUM_TOKENS // 2)
        patch.setitem(LORA_VARIANTS, "cpu", LORA_VARIANTS["gpu"])  # as on a GPU
        core, _ = build_core(
            EngineConfig(
                model=str(directory / "base"), page_size=PAGE_SIZE, max_rank=MAX_RANK,
                max_model_len=64, max_num_seqs=MAX_NUM_SEQS, checked=True,
                max_num_batched_tokens=MAX_NUM_TOKENS, max_adapter_slots=16,
                pool_bytes=NUM_PAGES * page_bytes,
            ),
            quiet,
            make_loader=keep_loader,
        )  # fmt: skip
    runner = core._runner
    assert isinstance(runner, DeviceRunner)
    return Engine(runner, core._config, written, loads[0], oracle, adapters)


class EngineDriver(Conversation):
    """One core on the shared runner, and all that it has said so far."""

    _first_tags = itertools.count(1, 1_000_000)

    def __init__(self, engine: Engine, **changes: Any) -> None:
        super().__init__()
        self.engine = engine
        self.config = dataclasses.replace(engine.config, **changes)
        self.core = EngineCore(
            self.config,
            engine.runner,
            engine.load,
            clock=lambda: self.now_s,
            loader_executor=self.executor,
        )
        # Owner tags that no earlier core has left on the device: an old one could hide a misread.
        self.core._next_tag = itertools.count(next(self._first_tags)).__next__
        self.core._host_store._next_tag = self.core._next_tag
        self.requests: dict[str, tuple[list[int], dict[str, Any]]] = {}

    # --- what a frontend would do ---

    def generate(self, prompt: list[int], adapter_id: str | None = None, **params: Any) -> str:
        """Greedy unless said, as frontends send it: `seed` resolved."""
        params = {"temperature": 0.0, "max_tokens": 8, "seed": 0, **params}
        request_id = self.submit(prompt, params, adapter_id)
        self.requests[request_id] = (prompt, params)
        return request_id

    def abort(self, request_id: str) -> None:
        self.core.submit(Abort(request_id=request_id))

    def loaded(self, adapter_id: str, content: int, **options: Any) -> str:
        """Load adapter number `content`; its version."""
        return self.loaded_from(adapter_id, self.engine.adapters[content].path, **options)

    def loaded_from(self, adapter_id: str, path: str, **options: Any) -> str:
        call_id = self.load(adapter_id, path, **options)
        while call_id not in self.replies:
            self.step()
        info = self.replies[call_id]
        assert isinstance(info, dict), info
        version = info["version"]
        assert isinstance(version, str)
        return version

    # --- time ---

    def step(self) -> None:
        self.take_step()
        assert self.death is None, self.death  # a violation of ownership is a death, too

    def run(self, max_steps: int = 5000) -> None:
        """Step until idle."""
        self.step()
        for _ in range(max_steps):
            if self.core.is_idle:
                self.core.check_integrity()
                return
            self.step()
        raise AssertionError(f"not idle after {max_steps} steps")

    # --- what is right ---

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return self.answers[request_id, index].token_ids

    def check(self, request_id: str, content: int | None, version: str | None) -> None:
        """Assert that a finished request's choices are what the oracle of that adapter allows."""
        adapter = None if content is None else self.engine.adapters[content]
        self.check_adapter(request_id, adapter, version)

    def check_adapter(self, request_id: str, adapter: Adapter | None, version: str | None) -> None:
        prompt, fields = self.requests[request_id]
        params = SamplingParams(**fields)
        for index in range(params.n):
            answer = self.answers[request_id, index]
            assert answer.versions == {version}
            self.engine.oracle.check(prompt, params, index, adapter, answer, self.config)

    def is_finished(self, request_id: str) -> bool:
        _, fields = self.requests[request_id]
        answers = [self.answers.get((request_id, i)) for i in range(fields.get("n", 1))]
        return all(answer is not None and answer.finish_reason is not None for answer in answers)

    def check_freed(self) -> None:
        """Assert that an idle core holds nothing but idle adapters."""
        assert self.core.is_idle
        self.core.check_integrity()
        stats = self.core.stats()
        assert stats["num_requests"] == stats["num_running"] == stats["num_waiting"] == 0
        assert stats["num_adapters_draining"] == 0
        assert stats["num_pages_adapters_idle"] == stats["num_pages_adapters"]
        assert stats["num_pages_free"] + stats["num_pages_adapters"] == stats["num_pages"]
