"""A core on a device that takes time: what each step costs is the test's to say, and so is the
clock. Tokens mean nothing here; see `core_driver` for what may be handed out.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from sloraj.batch import SampledToken, ScheduledBatch, StepResult
from sloraj.config import SchedulerConfig
from sloraj.core import EngineCore
from tests.sloraj.conversation import Conversation
from tests.sloraj.core_driver import load_from_path

TIMED_CONFIG = SchedulerConfig(
    num_pages=20_000,
    page_size=16,
    max_model_len=4096,
    max_num_seqs=64,
    max_num_batched_tokens=1024,
    max_adapter_slots=64,
    max_num_waiting=100_000,
    max_rank=64,
    vocab_size=50,
    eos_token_ids=(),
    token_buckets=(128, 256, 512, 1024),
)


def true_cost_s(batch: ScheduledBatch) -> float:
    """Seconds of a step on the test's device. Not the model's features: tokens are not padded."""
    single = [row for row in batch.rows if row.num_tokens == 1]
    context_s = 1.5e-7 * sum(row.start for row in single)
    compute_s = max(4e-3, 2.2e-5 * batch.num_tokens)
    bus_s = sum(install.packed.num_bytes for install in batch.installs) / 2e10
    return compute_s + context_s + 8e-6 * len(single) + bus_s


class TimedRunner:
    """Implements `sloraj.batch.Runner`: steps end one after the other; `collect` waits."""

    def __init__(
        self, driver: TimedDriver, cost_s: Callable[[ScheduledBatch], float], noise: float
    ) -> None:
        self._driver, self._cost_s = driver, cost_s
        self._noise, self._random = noise, random.Random(1)
        self._ends_s = 0.0
        self.first_batch_of: dict[str, int] = {}  # request -> step that admitted it

    def execute(self, batch: ScheduledBatch) -> tuple[ScheduledBatch, float]:
        for row in batch.rows:
            if row.is_reset:
                self.first_batch_of.setdefault(row.sequence.request_id, batch.step)
        cost_s = self._cost_s(batch) * self._random.lognormvariate(0, self._noise)
        self._ends_s = max(self._ends_s, self._driver.now_s) + cost_s
        return batch, self._ends_s

    def collect(self, handle: tuple[ScheduledBatch, float]) -> StepResult:
        batch, ends_s = handle
        self._driver.now_s = max(self._driver.now_s, ends_s)
        tokens = [SampledToken(row.sequence, 3, True) for row in batch.rows if row.samples]
        return StepResult(batch.step, tuple(tokens))

    def stats(self) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class Arrival:
    at_s: float
    num_prompt: int
    num_output: int
    adapter_id: str | None = None


class TimedDriver(Conversation):
    """`played` requests and, by request, how long after its arrival the first token came."""

    def __init__(
        self, cost_s: Callable[[ScheduledBatch], float] = true_cost_s, noise: float = 0.02,
        **changes: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.now_s = 0.0
        self.config = dataclasses.replace(TIMED_CONFIG, **changes)
        self.runner = TimedRunner(self, cost_s, noise)
        self.core = EngineCore(
            self.config, self.runner, load_from_path, clock=lambda: self.now_s,
            loader_executor=self.executor,
        )  # fmt: skip
        self.first_token_after_s: dict[str, float] = {}
        self.before_step: Callable[[], None] = lambda: None
        self._arrived_s: dict[str, float] = {}

    def play(self, arrivals: Iterable[Arrival], **params: Any) -> list[str]:
        """All requests at their moments, and on until the last has ended; their ids."""
        due = deque(sorted(arrivals, key=lambda arrival: arrival.at_s))
        ids: list[str] = []
        while due or not self.core.is_idle:
            if due and self.core.is_idle:
                self.now_s = max(self.now_s, due[0].at_s)
            while due and due[0].at_s <= self.now_s:
                arrival = due.popleft()
                request_id = self.submit(
                    [1] * arrival.num_prompt,
                    {"max_tokens": arrival.num_output, "ignore_eos": True, **params},
                    arrival.adapter_id,
                )
                ids.append(request_id)
                self._arrived_s[request_id] = self.now_s
            self.before_step()
            before = len(self.messages)
            for message in self.core.step():
                self._hear(message)
            for message in self.messages[before:]:
                request_id = getattr(message, "request_id", "")
                if request_id in self._arrived_s and (request_id, 0) in self.answers:
                    self.first_token_after_s.setdefault(
                        request_id, self.now_s - self._arrived_s[request_id]
                    )
            self.messages.clear()
        return ids

    def attainment(self, ids: list[str], slo_s: float) -> float:
        """The share of requests whose first token came within the objective."""
        firsts = [self.first_token_after_s.get(request_id, slo_s) for request_id in ids]
        return sum(first < slo_s for first in firsts) / len(firsts)
