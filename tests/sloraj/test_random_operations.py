"""Laws that hold under any order of operations: no page, slot, row or lease is lost or misread,
and every answer is what the request gets alone, on the adapter version it started on.

More than 100,000 random operations of load, reload, unload, request, cancel and step over several
geometries, in most of which adapters and tokens fight for pages; integrity is checked at each step.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from sloraj.errors import AdapterBusy, AdapterExists, AdapterNotFound, FirstTokenTooLate
from sloraj.messages import Abort
from sloraj.policies.cost import BaseBytes
from sloraj.policies.settings import QueueConfig
from tests.sloraj.core_driver import EOS, CoreDriver

NUM_OPERATIONS = 120_000
NAMES = ("a", "b", "c", "d", "e")
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny pool": {"num_pages": 12, "page_size": 2, "max_adapter_slots": 3, "max_model_len": 20},
    "one slot": {"num_pages": 20, "page_size": 2, "max_adapter_slots": 1, "max_model_len": 20},
    "one token a page": {"num_pages": 30, "page_size": 1, "max_model_len": 20},
    "one row": {"num_pages": 14, "page_size": 2, "max_num_seqs": 1, "max_model_len": 20},
    "many rows": {
        "num_pages": 22,
        "page_size": 2,
        "max_num_seqs": 10,
        "max_num_batched_tokens": 11,
        "token_buckets": (4, 6, 11),
        "max_model_len": 24,
        "install_pages_per_step": 5,
    },
    "fixed split": {
        "num_pages": 20,
        "page_size": 2,
        "max_model_len": 20,
        "num_adapter_pages": 6,
    },
    "room for all": {"num_pages": 120, "max_num_seqs": 8, "max_adapter_slots": 16},
}
CLUSTERED = {"cluster_adapters": 1, "cluster_max_overtakes": 6, "cluster_max_wait_s": 0.5}
POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "fcfs, clustered": CLUSTERED,
    "priority": {"queue_order": "priority", "priority_ageing_s": 0.1},
    "priority, clustered": {"queue_order": "priority", **CLUSTERED},
    "vtc": {"queue_order": "vtc", "tenant_weights": (("t0", 2.0), ("a", 0.5))},
    "vtc, tolerant": {"queue_order": "vtc", "tenant_tolerance": 30.0, "tenant_headroom": 0.3},
    "vtc, clustered": {"queue_order": "vtc", "cluster_max_lead": 20.0, **CLUSTERED},
}
# What looks ahead or back, with every order of the queue that it may have. A step takes 10 ms.
MODEL = {"early_abort": "model", "first_token_slo_s": 0.12}
LARGEST = {"early_abort": "largest", "first_token_slo_s": 0.12}
PAPER = {"early_abort": "paper", "first_token_slo_s": 0.6}
FORESIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "all on": ("vtc, clustered", MODEL),
    "all on, by priority": ("priority, clustered", MODEL),
    "all on, first come": ("fcfs", MODEL),
    "all on, the largest refused": ("vtc, tolerant", LARGEST),
    "the paper's": ("fcfs", {**PAPER, "retention": "paper"}),
    "abort alone": ("fcfs, clustered", {**MODEL, "retention": "lru", "prefetch": False}),
    "prefetch and the paper's retention": ("vtc", {"retention": "paper"}),
}
BASE_BYTES = BaseBytes(weights=160, row=80)


class _Traffic:
    """Random operations on a driver, and what must come of each request."""

    def __init__(self, seed: int, changes: dict[str, Any]) -> None:
        self.random = random.Random(seed)
        self.driver = CoreDriver(**changes)
        self.loaded: dict[str, int] = {}  # name -> content, as the core will see it
        self.loading: dict[str, int] = {}
        self.unloads: list[int] = []  # calls that must be answered in the end
        self.open: dict[str, tuple[list[int], int, dict[str, Any]]] = {}
        self.refused: list[str] = []  # of these, all must have named an unknown adapter
        self.num_checked = 0
        self.num_too_large = 0
        self.num_late = 0

    def operate(self) -> None:
        roll = self.random.random()
        if roll < 0.5:
            self.driver.step()
            self.check_finished()
        elif roll < 0.86:
            self.request()
        elif roll < 0.90:
            self.cancel()
        elif roll < 0.95:
            self.load()
        elif roll < 0.97:
            self.finish_loads()
        else:
            self.unload()

    def request(self) -> None:
        if len(self.open) >= 24:
            return
        name = self.random.choice([None, *NAMES])
        limit = self.driver.config.max_model_len
        prompt = [self.random.randrange(50) for _ in range(self.random.randint(1, limit // 2))]
        params = {
            "max_tokens": self.random.randint(1, limit // 3),
            "ignore_eos": self.random.random() < 0.5,
            "n": self.random.choice([1, 1, 1, 2]),
            "temperature": self.random.choice([0.0, 1.0]),
            "seed": self.random.randrange(100),
        }
        standing: dict[str, Any] = {}
        if self.driver.config.queue.queue_order != "fcfs":
            standing["priority"] = self.random.choice([0, 0, 1, -3])
            standing["tenant"] = self.random.choice([None, "t0", "t1", f"t{len(self.open)}"])
        request_id = self.driver.generate(prompt, name, **params, **standing)
        if name is None or name in self.loaded:
            self.open[request_id] = (prompt, 0 if name is None else self.loaded[name], params)
        else:
            self.refused.append(request_id)

    def cancel(self) -> None:
        if self.open:
            request_id = self.random.choice(list(self.open))
            self.driver.core.submit(Abort(request_id=request_id))
            del self.open[request_id]
            self.driver.step()
            self.check_finished()

    def load(self) -> None:
        """Load now, or start a load that `finish_loads` ends."""
        name, content = self.random.choice(NAMES), self.random.randint(1, 8)
        path, replace = f"{content}:{content % 5 + 1}", self.random.random() < 0.7
        self.driver.executor.is_held = self.random.random() < 0.3
        call_id = self.driver.load(name, path, replace=replace, pinned=self.random.random() < 0.1)
        self.driver.step()
        self.check_finished()
        reply = self.driver.replies.get(call_id)
        if isinstance(reply, dict):
            assert reply["version"] == f"v{content}"
            assert (replace or name not in self.loaded) and name not in self.loading
            self.loaded[name] = content
        elif reply is None:
            assert self.driver.executor.is_held and name not in self.loading
            self.loading[name] = content
        elif isinstance(reply, AdapterExists):
            assert name in self.loaded and not replace
        else:
            assert isinstance(reply, AdapterBusy)
            assert name in self.loading or name not in self.loaded  # it still unloads

    def finish_loads(self) -> None:
        self.driver.executor.release()
        self.loaded |= self.loading
        self.loading.clear()

    def unload(self) -> None:
        name = self.random.choice(NAMES)
        call_id = self.driver.unload(name)
        self.driver.step()
        self.check_finished()
        if name in self.loading:
            assert isinstance(self.driver.replies[call_id], AdapterBusy)
        elif name not in self.loaded:
            assert isinstance(self.driver.replies[call_id], AdapterNotFound)
        else:
            del self.loaded[name]
            self.unloads.append(call_id)

    def check_finished(self) -> None:
        while self.refused:
            assert isinstance(self.driver.failures.pop(self.refused.pop()), AdapterNotFound)
        for request_id, (prompt, content, params) in list(self.open.items()):
            failure = self.driver.failures.pop(request_id, None)
            if isinstance(failure, FirstTokenTooLate):
                assert self.driver.config.early_abort is not None
                assert not any(answer_id == request_id for answer_id, _ in self.driver.answers)
                self.num_late += 1
                del self.open[request_id]
                continue
            if failure is not None:  # the adapter and these tokens together exceed the pool
                assert failure.param == "max_tokens"
                self.num_too_large += 1
                del self.open[request_id]
                continue
            answers = [self.driver.answers.get((request_id, i)) for i in range(params["n"])]
            if any(answer is None or answer.finish_reason is None for answer in answers):
                continue
            del self.open[request_id]
            for index in range(params["n"]):
                self.driver.expect(
                    request_id,
                    prompt,
                    content,
                    index,
                    params["max_tokens"],
                    params["seed"] if params["temperature"] else None,
                    () if params["ignore_eos"] else (EOS,),
                )
                del self.driver.answers[request_id, index]
            self.num_checked += 1


def _run(geometry: str, num_operations: int, changes: dict[str, Any]) -> _Traffic:
    """That many operations, and then all to its end: nothing is open, and nothing held."""
    changes = {**GEOMETRIES[geometry], **changes}
    traffic = _Traffic(list(GEOMETRIES).index(geometry), changes)
    for _ in range(num_operations):
        traffic.operate()
    traffic.finish_loads()
    for name in traffic.loaded:
        traffic.unloads.append(traffic.driver.unload(name))
    traffic.driver.run()
    traffic.check_finished()
    assert not traffic.open
    assert all(traffic.driver.replies[call_id] is None for call_id in traffic.unloads)
    traffic.driver.expect_clean()
    stats = traffic.driver.core.stats()
    assert stats["num_pages_free"] == stats["num_pages"]
    assert stats["num_adapter_versions"] == stats["num_adapters"] == stats["num_leases"] == 0
    return traffic


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_random_operations_lose_nothing_and_change_no_answer(
    geometry: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sloraj.token_budget.WEIGHT_BOUND_TOKENS", 3)  # so that chunks are cut
    num_operations = NUM_OPERATIONS // len(GEOMETRIES) // (1 if policy == "fcfs" else 8) + 1
    queue = QueueConfig(**POLICIES[policy])
    traffic = _run(geometry, num_operations, {"queue": queue, "base_bytes": BASE_BYTES})
    stats = traffic.driver.core.stats()
    assert traffic.num_checked > num_operations // 20
    # The traffic reached what it is meant to reach.
    assert (traffic.num_too_large > 0) == (geometry == "tiny pool")
    assert (stats["preemptions"] > 0) == (geometry not in ("one row", "room for all"))
    assert (stats["adapter_evictions"] > 0) == (geometry != "room for all")
    if policy == "fcfs" or geometry != "one slot":
        assert traffic.driver.runner.num_sends > 0
    if queue.queue_order != "fcfs" or (policy != "fcfs" and geometry != "one row"):
        assert stats["queue"]["overtakes"] > 0


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("policies", FORESIGHT)
def test_policies_together_lose_nothing_and_change_no_answer(
    geometry: str, policies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early abort, prefetch and retention, with every order: what is refused leaves nothing, what
    is not is answered as it would be alone, and nobody waits for ever.
    """
    monkeypatch.setattr("sloraj.token_budget.WEIGHT_BOUND_TOKENS", 3)
    num_operations = NUM_OPERATIONS // len(GEOMETRIES) // 10 + 1
    order, changes = FORESIGHT[policies]
    queue = QueueConfig(**POLICIES[order])
    changes = {"queue": queue, "base_bytes": BASE_BYTES, **changes}
    traffic = _run(geometry, num_operations, changes)
    counts = traffic.driver.core.stats()["adapters"]
    assert traffic.num_checked > num_operations // 25
    if "early_abort" in changes and geometry in ("tiny pool", "one slot", "one row"):
        assert traffic.num_late > 0
    assert counts["prefetched"] == counts["prefetched_used"] + counts["prefetched_wasted"]
    assert (counts["prefetched"] > 0) <= changes.get("prefetch", True)
    assert (counts["evictions"]["policy"] > 0) == (changes.get("retention") == "paper")
