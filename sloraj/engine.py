"""`Engine`: the Python interface. Many prompts, each with its own adapter, in one batch.

with Engine("path/to/base", adapters={"sql": "path/to/sql-lora"}) as engine:
    for answer in engine.generate(["How many users?", "Hello"], adapter=["sql", None]):
        print(answer.text)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any

from sloraj.completion import Completion
from sloraj.config import EngineConfig
from sloraj.errors import InvalidRequest
from sloraj.frontend import Frontend
from sloraj.frontend_api import AdapterInfo, EngineHealth, ModelInfo
from sloraj.launch import ProgressBars, start_frontend
from sloraj.offline import CompletionStream, Job, JobRunner, Prompt, Window
from sloraj.request import SamplingParams
from sloraj.tokenizer import Tokenizer
from sloraj.transport import DEFAULT_CORE_FACTORY

Path = str | os.PathLike[str]


class Engine:
    """A running engine: a context manager, or `close` it. Safe to use from many threads.

    Args:
        model: directory of the base model.
        adapters: adapter name -> directory, loaded before this returns.
        process: run the engine in a process of its own instead of a thread of this one.
        progress: draw bars while loading and compiling; None means when stderr is a terminal.
        settings: the other fields of EngineConfig, e.g. `max_num_seqs=8`.
    Raises: ConfigError, AdapterLoadError, EngineUnavailable.
    """

    def __init__(
        self,
        model: Path,
        *,
        adapters: Mapping[str, Path] | Items[tuple[str, Path]] = (),
        process: bool = False,
        progress: bool | None = None,
        core_factory: str = DEFAULT_CORE_FACTORY,
        **settings: Any,
    ) -> None:
        pairs = adapters.items() if isinstance(adapters, Mapping) else adapters
        config = EngineConfig(
            model=os.fspath(model),
            adapters=tuple((name, os.fspath(path)) for name, path in pairs),
            **settings,
        )
        is_shown = sys.stderr.isatty() if progress is None else progress
        bars = ProgressBars() if is_shown else None
        try:
            self._frontend: Frontend = start_frontend(
                config, process=process, core_factory=core_factory, on_progress=bars
            )
        finally:
            if bars is not None:
                bars.close()
        limits = (config.max_num_waiting, config.tenant_max_waiting)  # all may be of one tenant
        self._runner = JobRunner(self._frontend, Window(min(n for n in limits if n is not None)))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> ModelInfo:
        return self._frontend.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._frontend.tokenizer

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        params: SamplingParams | Items[SamplingParams] | None = None,
        adapter: str | Items[str | None] | None = None,
        *,
        priority: int | Items[int] = 0,
        tenant: str | Items[str | None] | None = None,
        return_errors: bool = False,
    ) -> list[Completion]:
        """Answer prompts in one batch, as far as it holds them; results in their order.

        Args:
            prompts: one, or a list; a list of integers is one prompt of token ids.
            params: for all, or one each. adapter: a name or None (the base model) for all, or one
            each. One prompt with a list of params or adapters is asked once for each.
            priority, tenant: for all, or one each. The lower priority is served the earlier (needs
            queue_order "priority" or "vtc"); the tenant is to whose account "vtc" puts it, None:
            the adapter's name, or the base model's.
            return_errors: put a failure into its own `Completion.error` instead of raising the
            first.
        Raises: SlorajError. The other requests are then dropped.
        """
        return self._runner.run_all(
            _align(prompts, params, adapter, priority, tenant), return_errors=return_errors
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        *,
        priority: int = 0,
        tenant: str | None = None,
    ) -> CompletionStream:
        """Answer one prompt piece by piece. The request starts now; closing the iterator drops it.

            for piece in engine.stream("Once upon a time"):
                print(piece.text, end="", flush=True)

        Raises: SlorajError, here or from the iterator.
        """
        return CompletionStream(
            self._runner, Job(prompt, params or SamplingParams(), adapter, priority, tenant)
        )

    def load_adapter(
        self, adapter_id: str, path: Path, *, replace: bool = False, pinned: bool = False
    ) -> AdapterInfo:
        """Make an adapter available under a name. Raises AdapterError.

        `replace` swaps the version behind a taken name; running requests finish on the old one.
        """
        return self._frontend.load_adapter(
            adapter_id, os.fspath(path), replace=replace, pinned=pinned
        ).result()

    def unload_adapter(self, adapter_id: str) -> None:
        """Take a name away, and wait for its last request. Raises AdapterNotFound, AdapterBusy."""
        self._frontend.unload_adapter(adapter_id).result()

    def list_adapters(self) -> list[AdapterInfo]:
        return self._frontend.list_adapters().result()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the engine, as plain values."""
        return self._frontend.stats().result()

    def health(self) -> EngineHealth:
        return self._frontend.health()

    def close(self) -> None:
        """End the engine; what still runs fails with EngineUnavailable. Idempotent."""
        self._frontend.stop()


def _align(
    prompts: Prompt | Items[Prompt],
    params: SamplingParams | Items[SamplingParams] | None,
    adapter: str | Items[str | None] | None,
    priority: int | Items[int],
    tenant: str | Items[str | None] | None,
) -> list[Job]:
    """One job a row; a column of one serves all rows. Raises InvalidRequest."""
    is_one_prompt = isinstance(prompts, str) or (
        len(prompts) > 0 and all(isinstance(p, int) for p in prompts)
    )
    columns: dict[str, list[Any]] = {
        "prompts": [prompts] if is_one_prompt else list(prompts),
        "params": [params or SamplingParams()]
        if params is None or isinstance(params, SamplingParams)
        else list(params),
        "adapter": [adapter] if adapter is None or isinstance(adapter, str) else list(adapter),
        "priority": [priority] if isinstance(priority, int) else list(priority),
        "tenant": [tenant] if tenant is None or isinstance(tenant, str) else list(tenant),
    }
    num_jobs = max(map(len, columns.values())) if columns["prompts"] else 0
    for name, column in columns.items():
        if len(column) not in (1, num_jobs):
            raise InvalidRequest(
                f"{name}: got {len(column)}, allowed: 1 or as many as the longest list, {num_jobs}",
                param=name,
            )
    rows = zip(*(c * num_jobs if len(c) == 1 else c for c in columns.values()), strict=True)
    return [Job(*row) for row in rows]
