"""Drives an EngineCore over a FakeRunner by hand: no threads, a clock that ticks with each step."""

from __future__ import annotations

import dataclasses
from typing import Any

from checkpoints.errors import CheckpointNotFound, InvalidCheckpoint
from sloraj.admission import choice_seed
from sloraj.batch import PackedAdapter
from sloraj.config import SchedulerConfig
from sloraj.core import EngineCore
from sloraj.errors import AdapterLoadError
from tests.sloraj.conversation import Conversation
from tests.sloraj.fake_runner import FakeRunner, packed_adapter, tokens_alone

VOCAB = 50
EOS = 7
DEFAULT_CONFIG = SchedulerConfig(
    num_pages=40,
    page_size=4,
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_adapter_slots=4,
    max_num_waiting=1000,
    max_rank=64,
    vocab_size=VOCAB,
    eos_token_ids=(EOS,),
)


def load_from_path(path: str) -> tuple[PackedAdapter, dict[str, Any]]:
    """ "content:num_pages[:rank]" -> an adapter; a word is what it says."""
    match path:
        case "missing":
            raise CheckpointNotFound("adapter_config.json is missing")
        case "damaged":
            raise InvalidCheckpoint("the tensor is cut short")
        case "unreadable":
            raise PermissionError("not for you")
        case "fault":
            raise ZeroDivisionError("a fault of ours")
    try:
        content, num_pages, *rank = map(int, path.split(":"))
    except ValueError:
        raise AdapterLoadError(f"bad path {path!r}", param="lora_path") from None
    return packed_adapter(content, num_pages, *rank), {}


class CoreDriver(Conversation):
    """One core, and what it has said so far."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.config = dataclasses.replace(DEFAULT_CONFIG, **changes)
        self.runner = FakeRunner(
            self.config.num_pages,
            self.config.page_size,
            self.config.max_num_seqs,
            self.config.vocab_size,
            self.config.max_num_batched_tokens,
        )
        self.core = EngineCore(
            self.config,
            self.runner,
            load_from_path,
            clock=lambda: self.now_s,
            loader_executor=self.executor,
        )

    # --- what a frontend would do ---

    def generate(
        self,
        prompt: list[int],
        adapter_id: str | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str | None = None,
        **params: Any,
    ) -> str:
        params = {"temperature": 0.0, "ignore_eos": True, **params}
        return self.submit(prompt, params, adapter_id, request_id, priority, tenant)

    def loaded(self, adapter_id: str, path: str, **options: Any) -> dict[str, Any]:
        """Load, and see that it worked."""
        call_id = self.load(adapter_id, path, **options)
        self.step()
        info = self.replies[call_id]
        assert isinstance(info, dict), info
        return info

    def call(self, kind: Any, **fields: Any) -> int:
        call_id = next(self._ids)
        self.core.submit(kind(call_id=call_id, **fields))
        return call_id

    def ask(self, kind: Any, **fields: Any) -> Any:
        """The reply to a call that is answered within a step."""
        call_id = self.call(kind, **fields)
        self.step()
        return self.replies[call_id]

    # --- time ---

    def step(self) -> None:
        self.take_step()
        self.core.check_integrity()
        assert not self.runner.violations, self.runner.violations[0]

    def run(self, max_steps: int = 10_000) -> None:
        """Step until idle."""
        self.step()
        for _ in range(max_steps):
            if self.core.is_idle:
                return
            self.step()
        raise AssertionError(f"not idle after {max_steps} steps")

    # --- what is right ---

    def expect(
        self,
        request_id: str,
        prompt: list[int],
        content: int = 0,
        index: int = 0,
        max_tokens: int = 16,
        seed: int | None = None,
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        """Assert that a choice answered as it would alone, under the adapter `content`."""
        choice = 0 if seed is None else choice_seed(seed, request_id, index)
        tokens, reason = tokens_alone(
            prompt, content, choice, self.config.vocab_size, max_tokens, set(stop_ids)
        )
        answer = self.answers[request_id, index]
        assert (answer.token_ids, answer.finish_reason) == (tokens, reason)
        assert answer.versions == {f"v{content}" if content else None}

    def expect_clean(self) -> None:
        """Assert that an idle core holds nothing but idle adapters."""
        assert self.core.is_idle
        stats = self.core.stats()
        assert stats["num_requests"] == stats["num_running"] == stats["num_waiting"] == 0
        assert stats["num_adapters_draining"] == 0
        assert stats["num_pages_adapters_idle"] == stats["num_pages_adapters"]
        assert stats["num_pages_free"] + stats["num_pages_adapters"] == stats["num_pages"]
