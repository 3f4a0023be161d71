"""Laws of VTC (arXiv:2401.00588) with the real scheduler over the fake device: what two backlogged
tenants receive differs by a bounded amount, whatever they send.

What each tenant receives is added up here from the steps that the device is given.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from typing import Any

import pytest

from sloraj.batch import ScheduledBatch
from sloraj.errors import QueueFull
from sloraj.policies import tenants as tenants_module
from sloraj.policies.cost import BaseBytes
from sloraj.policies.settings import QueueConfig
from sloraj.request import Sequence
from tests.sloraj.core_driver import CoreDriver

BASE = BaseBytes(weights=160, row=80)  # the fake's adapters hold 8 bytes a page
LOAD_COST = 20.0
WEIGHTS = {"double": 2.0, "half": 0.5}
ROWS = 4


class Ledger:
    """Service by tenant, from the steps: prompts when first admitted, tokens when sampled, and the
    bytes of an adapter with the first sequence that uses them.
    """

    def __init__(self, driver: CoreDriver) -> None:
        self.service: dict[str, float] = defaultdict(float)
        self.admitted: list[Sequence] = []  # each once, in order
        self.largest: dict[str, float] = defaultdict(float)  # what one admission may add at most
        self._is_seen: set[Sequence] = set()
        self._unused: set[str] = set()  # adapter versions on the device, or on their way there
        driver.runner.before_execute = self._enter

    def _enter(self, batch: ScheduledBatch) -> None:
        self._unused |= {install.packed.version_id for install in batch.installs}
        rows = [row for row in batch.rows if row.is_reset]
        for row in sorted(rows, key=lambda row: row.sequence.admission):
            sequence = row.sequence
            is_load = sequence.version_id in self._unused
            self._unused.discard(sequence.version_id or "")
            if sequence not in self._is_seen:  # else it was preempted
                self._is_seen.add(sequence)
                self.admitted.append(sequence)
                self._charge(sequence.tenant, admission_cost(sequence, is_load))
        for row in batch.rows:
            if row.samples:
                self._charge(row.sequence.tenant, token_cost(row.sequence))

    def _charge(self, tenant: str, cost: float) -> None:
        self.service[tenant] += cost / WEIGHTS.get(tenant, 1.0)


def admission_cost(sequence: Sequence, is_load: bool) -> float:
    """1 a prompt token, more with an adapter; its bytes, if they come for it."""
    share = sequence.adapter_bytes / BASE.weights
    return len(sequence.prompt_token_ids) * (1 + share) + is_load * LOAD_COST * share


def token_cost(sequence: Sequence) -> float:
    return 2 * (1 + sequence.adapter_bytes / BASE.row)


def bound(tenant: str, max_prompt: int, max_output: int, adapter_bytes: int) -> float:
    """By how much a backlogged tenant can be ahead of another: its last admission, when it was not
    ahead, and all that its running sequences, at most one a row, could still sample.
    """
    share = adapter_bytes / BASE.weights
    prompt = max_prompt * (1 + share) + LOAD_COST * share
    outputs = ROWS * max_output * 2 * (1 + adapter_bytes / BASE.row)
    return (prompt + outputs) / WEIGHTS.get(tenant, 1.0)


def fair(**changes: Any) -> CoreDriver:
    queue = QueueConfig(
        queue_order="vtc", tenant_weights=tuple(WEIGHTS.items()), adapter_load_cost=LOAD_COST
    )
    queue = dataclasses.replace(queue, **changes.pop("queue", {}))
    return CoreDriver(queue=queue, base_bytes=BASE, max_num_seqs=ROWS, **changes)


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a tenant keeps sending: it never has fewer than `backlog` requests waiting."""

    tenant: str
    backlog: int
    max_prompt: int
    max_output: int
    contents: tuple[int, ...]  # of its adapters; 0 is the base model


class Flood:
    """Tenants that are all backlogged, and more that come and go."""

    def __init__(self, driver: CoreDriver, demands: tuple[Demand, ...], seed: int) -> None:
        self.random = random.Random(seed)
        self.driver = driver
        self.demands = demands
        self.ledger = Ledger(driver)
        self.waiting: dict[str, set[Sequence]] = defaultdict(set)
        for content in range(1, 6):
            driver.loaded(f"a{content}", f"{content}:{content}")

    def send(self, demand: Demand) -> None:
        content = self.random.choice(demand.contents)
        self.driver.generate(
            [self.random.randrange(50) for _ in range(self.random.randint(1, demand.max_prompt))],
            f"a{content}" if content else None,
            tenant=demand.tenant,
            max_tokens=self.random.randint(1, demand.max_output),
            ignore_eos=self.random.random() < 0.7,
        )

    def num_waiting(self, tenant: str) -> int:
        requests = self.driver.core._requests
        sequences = [s for request in requests for s in request.sequences]
        return sum(s.tenant == tenant and s.admission == 0 for s in sequences)

    def step(self, *, comers: bool = True) -> None:
        for demand in self.demands:
            for _ in range(demand.backlog - self.num_waiting(demand.tenant)):
                self.send(demand)
        if comers and self.random.random() < 0.1:
            self.send(Demand(f"comer {self.random.randrange(50)}", 0, 9, 9, (0, 5)))
        self.driver.step()
        assert all(self.num_waiting(demand.tenant) for demand in self.demands)

    def widest_gap(self, one: str, other: str, num_steps: int) -> float:
        """The largest difference of the service that two tenants receive over any interval."""
        gaps = []
        for _ in range(num_steps):
            self.step()
            gaps.append(self.ledger.service[one] - self.ledger.service[other])
        return max(gaps) - min(gaps)


SMALL = Demand("small", 12, 3, 3, (0,))
LARGE = Demand("large", 12, 20, 9, (0, 1))
COLD = Demand("cold", 12, 9, 9, (1, 2, 3, 4, 5))
DOUBLE = Demand("double", 12, 9, 9, (2,))
HALF = Demand("half", 12, 9, 9, (0, 3))
GREEDY = Demand("greedy", 60, 9, 9, (0, 1))
SHY = Demand("shy", 8, 9, 9, (0, 1))


def limit_of(*demands: Demand) -> float:
    return sum(bound(d.tenant, d.max_prompt, d.max_output, 8 * max(d.contents)) for d in demands)


@pytest.mark.parametrize("num_pages", [18, 120], ids=["preemption", "room"])
@pytest.mark.parametrize(
    "demands",
    [(SMALL, LARGE), (COLD, SMALL), (DOUBLE, HALF), (GREEDY, SHY), (DOUBLE, LARGE, COLD, SMALL)],
    ids=lambda demands: " ".join(d.tenant for d in demands),
)
def test_what_two_backlogged_tenants_receive_differs_by_no_more_than_the_bound(
    demands: tuple[Demand, ...], num_pages: int
) -> None:
    for seed in range(3):
        driver = fair(num_pages=num_pages, page_size=2, max_adapter_slots=3, max_model_len=30)
        flood = Flood(driver, demands, seed)
        one, other = demands[:2]
        assert flood.widest_gap(one.tenant, other.tenant, 400) <= limit_of(one, other)
        spread = driver.core.stats()["queue"]["counter_spread"]
        assert spread <= max(limit_of(demand) for demand in demands)
        assert (driver.core.stats()["preemptions"] > 0) == (num_pages == 18)


@pytest.mark.parametrize("tolerance", [50.0, 400.0])
def test_a_tolerance_widens_the_bound_by_no_more_than_itself(tolerance: float) -> None:
    queue = {"tenant_tolerance": tolerance}
    driver = fair(num_pages=60, max_adapter_slots=3, queue=queue)
    gap = Flood(driver, (GREEDY, SHY), seed=0).widest_gap("greedy", "shy", 600)
    assert gap <= limit_of(GREEDY, SHY) + 2 * tolerance


@pytest.mark.parametrize("headroom", [0.25, 0.5])
def test_headroom_widens_the_bound_by_no_more_than_the_lead(headroom: float) -> None:
    queue = {"tenant_headroom": headroom, "cluster_max_lead": 100.0}
    for demands in ((GREEDY, SHY), (SMALL, LARGE)):
        driver = fair(num_pages=60, max_adapter_slots=3, queue=queue)
        one, other = (demand.tenant for demand in demands)
        gap = Flood(driver, demands, seed=0).widest_gap(one, other, 400)
        assert gap <= limit_of(*demands) + 2 * 100.0


def test_with_headroom_a_newcomer_runs_at_once_beside_a_flood() -> None:
    """Once anybody else runs, a row is left free; without it the newcomer waits for an end."""
    waits = {}
    for headroom in (0.0, 0.3):
        queue = QueueConfig(queue_order="vtc", tenant_headroom=headroom)
        driver = CoreDriver(queue=queue, base_bytes=BASE, max_num_seqs=10, num_pages=200)
        for tenant in ["light", *["flood"] * 40]:
            driver.generate([1, 2, 3], tenant=tenant, max_tokens=30, ignore_eos=True)
        for _ in range(10):
            driver.step()
        driver.generate([4, 5], tenant="newcomer", max_tokens=2, ignore_eos=True)
        driver.step()
        driver.core.check_integrity()
        sequences = [s for request in driver.core._requests for s in request.sequences]
        waits[headroom] = any(s.tenant == "newcomer" and s.admission == 0 for s in sequences)
        driver.run()
        driver.expect_clean()
    assert waits == {0.0: True, 0.3: False}


def test_first_come_first_served_breaks_that_bound() -> None:
    driver = fair(
        num_pages=60, queue={"queue_order": "fcfs", "tenant_weights": ()}, max_adapter_slots=3
    )
    gap = Flood(driver, (GREEDY, SHY), seed=0).widest_gap("greedy", "shy", 600)
    assert gap > limit_of(GREEDY, SHY)


def test_the_counters_are_the_service_received() -> None:
    driver = fair(num_pages=18, page_size=2, max_adapter_slots=3, max_model_len=30)
    flood = Flood(driver, (DOUBLE, COLD, LARGE), seed=4)
    for _ in range(300):
        flood.step(comers=False)
    accounts = driver.core._scheduler._waiting._order._tenants._accounts  # type: ignore[attr-defined]
    assert set(accounts) == {"double", "cold", "large"}
    for tenant, account in accounts.items():
        assert account.counter == pytest.approx(flood.ledger.service[tenant], rel=1e-9)
    assert driver.core.stats()["preemptions"] > 5


def test_service_is_in_proportion_to_the_weights() -> None:
    demands = tuple(Demand(name, 12, 9, 9, (0, 1)) for name in ("double", "plain", "half"))
    driver = fair(num_pages=60)
    flood = Flood(driver, demands, seed=5)
    for _ in range(1500):
        flood.step(comers=False)
    received = {d.tenant: flood.ledger.service[d.tenant] for d in demands}  # over the weight
    assert max(received.values()) - min(received.values()) < 0.05 * min(received.values())


def test_no_row_stays_empty_while_the_next_sequence_would_fit() -> None:
    driver = fair(num_pages=24, max_adapter_slots=3, max_num_batched_tokens=24, max_model_len=32)
    flood = Flood(driver, (GREEDY, COLD, SMALL), seed=6)
    enter, num_full = driver.runner.before_execute, 0

    def check(batch: ScheduledBatch) -> None:
        nonlocal num_full
        enter(batch)
        scheduler = driver.core._scheduler
        sequence = scheduler._waiting.first()
        if sequence is None or sequence.num_in_flight or batch.num_tokens == 24:
            return
        version = scheduler._holdings.version_of(sequence)
        num_pages = -(-sequence.num_tokens // driver.config.page_size) + scheduler.num_running
        num_full += 1
        assert scheduler.num_running == ROWS or not scheduler._residency.fits(version, num_pages)

    driver.runner.before_execute = check
    for _ in range(400):
        flood.step()
    assert num_full > 100


def test_a_tenant_below_its_share_waits_for_one_admission_at_most() -> None:
    driver = fair(num_pages=60)
    flood = Flood(driver, (GREEDY,), seed=7)
    for _ in range(30):
        for _ in range(40):  # in which the flood is served far more than what comes now
            flood.step(comers=False)
        before = len(flood.ledger.admitted)
        request_id = driver.generate([1] * 9, tenant="light", max_tokens=5)
        while not any(s.request_id == request_id for s in flood.ledger.admitted):
            flood.step(comers=False)
        since = [s.tenant for s in flood.ledger.admitted[before:]]
        assert since.index("light") <= 1


def test_a_flood_that_fills_its_own_room_leaves_that_of_others() -> None:
    driver = fair(num_pages=60, queue={"tenant_max_waiting": 5}, max_num_waiting=20)
    for _ in range(30):
        driver.generate([1], tenant="flood")
    kept = driver.generate([1], tenant="other")
    driver.run()
    refused = list(driver.failures.values())
    assert len(refused) == 25 and all(isinstance(error, QueueFull) for error in refused)
    assert all("--tenant-max-waiting" in error.message for error in refused)
    driver.expect(kept, [1])


def test_what_was_received_is_remembered_when_the_adapter_is_unloaded_and_comes_back() -> None:
    driver = fair(num_pages=80, max_model_len=40)
    ledger = Ledger(driver)
    driver.loaded("a", "1:1")
    for _ in range(60):
        driver.generate([1], tenant="b", max_tokens=2)
    driver.generate([1] * 30, "a", max_tokens=8)
    while not any(s.tenant == "a" for s in ledger.admitted):
        driver.step()
    driver.unload("a")
    while driver.core.stats()["num_adapters"] or driver.core.stats()["num_adapters_draining"]:
        driver.step()
    driver.loaded("a", "2:1")
    received = ledger.service["a"]
    request_id = driver.generate([1], "a", max_tokens=1)
    while not any(s.request_id == request_id for s in ledger.admitted):
        assert any(s.tenant == "b" for s in driver.core._scheduler._waiting)
        driver.step()
    assert ledger.service["b"] >= received


def test_idle_tenants_at_the_floor_are_forgotten_and_lose_nothing() -> None:
    driver = fair(num_pages=60)
    for number in range(200):
        driver.generate([1] * 5, tenant=f"comer {number}", max_tokens=2)
        driver.run()
    assert driver.core.stats()["queue"]["tenants"] <= 2
    assert driver.core.stats()["queue"]["tenants_forgotten"] == 0


def test_tenants_that_come_and_go_for_ever_take_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tenants_module, "MAX_IDLE_TENANTS", 10)
    driver = fair(num_pages=60)
    for number in range(600):
        driver.generate([1] * 5, tenant=f"comer {number}", max_tokens=3)
        if number > 20:  # so that the queue is never empty, and the floor does not rise
            driver.step()
        waiting = driver.core.stats()["num_requests"]
        assert driver.core.stats()["queue"]["tenants"] <= 10 + waiting
    assert driver.core.stats()["queue"]["tenants_forgotten"] > 0
    driver.run()
    driver.expect_clean()
