"""Laws of early abort: who is refused, how it is told, and how far the objective is met."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

import numpy as np
import pytest

from sloraj.errors import ConfigError, FirstTokenTooLate, InvalidRequest
from sloraj.messages import Abort, Generate
from sloraj.policies.early_abort import PaperAbort
from sloraj.request import SamplingParams, Sequence
from tests.sloraj.core_driver import CoreDriver
from tests.sloraj.test_scheduler import ByHand
from tests.sloraj.timed_driver import Arrival, TimedDriver

SLO_S = 1.0


def trace(rate: float, duration_s: float, *, cv: float = 1.0, seed: int = 0) -> list[Arrival]:
    draw = np.random.default_rng(seed)
    gaps = draw.gamma(1 / cv**2, cv**2 / rate, int(rate * duration_s))
    return [
        Arrival(float(at_s), int(draw.integers(8, 512)), int(draw.integers(8, 256)))
        for at_s in np.cumsum(gaps)
    ]


def saturated_rate(**changes: Any) -> float:
    driver = TimedDriver(**changes)
    return 400 / (driver.play(trace(1000.0, 0.4)) and driver.now_s)


# --- how far it gets ---


@pytest.mark.parametrize("changes", [{}, {"num_pages": 1500}, {"max_num_seqs": 24}], ids=str)
@pytest.mark.parametrize(("load", "cv"), [(0.9, 4.0), (1.5, 1.0)])
def test_more_requests_meet_their_objective_than_without_and_than_by_the_papers_rule(
    load: float, cv: float, changes: dict[str, Any]
) -> None:
    rate = saturated_rate(**changes)
    attained, late = {}, {}
    for kind in (None, "paper", "model", "largest"):
        driver = TimedDriver(first_token_slo_s=SLO_S, early_abort=kind, **changes)
        ids = driver.play(trace(load * rate, 12.0, cv=cv))
        attained[kind] = driver.attainment(ids, SLO_S)
        late[kind] = sum(after_s >= SLO_S for after_s in driver.first_token_after_s.values())
        late[kind] /= len(ids)
    assert attained["model"] > attained["paper"] - 0.005 and attained["model"] > attained[None]
    assert attained["largest"] > attained["model"] - 0.01
    if load > 1 and changes:  # memory or rows decide: who holds them for long makes many late
        assert attained["largest"] > attained["model"] + 0.02
    assert late["model"] < 0.01 and late["largest"] < 0.01  # hardly a prompt is computed in vain


@pytest.mark.parametrize("changes", [{}, {"num_pages": 1500}, {"max_num_seqs": 24}], ids=str)
def test_none_is_refused_that_would_have_been_in_time_for_certain(changes: dict[str, Any]) -> None:
    """All come at once, so by first come, first served those before the first late one are in time,
    and refusing others behind them changes nothing for them.
    """
    crowd = [Arrival(0.0, a.num_prompt, a.num_output) for a in trace(100.0, 2.0, seed=3)]
    first_token_after_s: dict[str | None, list[float | None]] = {}
    for kind in (None, "model"):
        driver = TimedDriver(first_token_slo_s=SLO_S, early_abort=kind, **changes)
        driver.play(trace(20.0, 3.0))  # it learns its device
        ids = driver.play([Arrival(driver.now_s, a.num_prompt, a.num_output) for a in crowd])
        first_token_after_s[kind] = [driver.first_token_after_s.get(r) for r in ids]
    alone = first_token_after_s[None]
    in_time = [i for i, after_s in enumerate(alone) if after_s is not None and after_s < 0.9]
    assert len(in_time) > 20
    assert all(first_token_after_s["model"][i] is not None for i in in_time)
    assert sum(after_s is None for after_s in first_token_after_s["model"]) > 20


def test_of_a_crowd_the_largest_are_refused() -> None:
    """Long answers hold their rows for 200 steps, short ones for 8."""
    driver = TimedDriver(first_token_slo_s=SLO_S, early_abort="largest", max_num_seqs=16)
    driver.play(trace(20.0, 3.0))
    sizes = [200 if i % 2 else 8 for i in range(120)]
    ids = driver.play([Arrival(driver.now_s, 64, size) for size in sizes])
    refused = [size for request, size in zip(ids, sizes, strict=True) if request in driver.failures]
    assert len(refused) > 20
    assert refused.count(200) > 4 * refused.count(8)


@pytest.mark.parametrize("kind", ["model", "largest"])
def test_no_request_is_refused_while_the_engine_keeps_up(kind: str) -> None:
    driver = TimedDriver(first_token_slo_s=SLO_S, early_abort=kind)
    ids = driver.play(trace(0.7 * saturated_rate(), 10.0))
    driver.core.check_integrity()
    assert not driver.failures
    assert driver.attainment(ids, SLO_S) == 1.0


def test_the_hopeless_are_told_at_once_and_when_to_come_back() -> None:
    driver = TimedDriver(first_token_slo_s=SLO_S, early_abort="model", max_num_seqs=8)
    driver.play(trace(10.0, 5.0))
    told_after_s: list[float] = []
    start_s = driver.now_s
    driver.before_step = lambda: told_after_s.extend(
        [driver.now_s - start_s] * (len(driver.failures) - len(told_after_s))
    )
    driver.play([Arrival(start_s, 400, 200) for _ in range(300)])
    errors = list(driver.failures.values())
    assert len(errors) > 200
    assert all(type(error) is FirstTokenTooLate for error in errors)
    assert all(1 <= (error.retry_after_s or 0) <= 60 for error in errors)
    assert "first_token_slo_s" in errors[0].message and "allowed: within 1 s" in errors[0].message
    assert np.percentile(told_after_s, 80) < 0.2  # long before the objective has passed


# --- whom it spares ---


@pytest.mark.parametrize("kind", ["model", "largest", "paper"])
def test_a_preempted_sequence_that_has_answered_is_never_given_up(kind: str) -> None:
    driver = CoreDriver(
        num_pages=10, page_size=2, max_num_seqs=2, max_model_len=20, early_abort=kind,
        first_token_slo_s=0.6,
    )  # fmt: skip
    ids = [driver.generate([n] * 4, max_tokens=12) for n in (1, 2)]
    driver.run()
    assert driver.core.stats()["preemptions"] > 0
    for n, request_id in zip((1, 2), ids, strict=True):
        driver.expect(request_id, [n] * 4, max_tokens=12)
    driver.now_s += 100
    driver.expect_clean()


@pytest.mark.parametrize("kind", ["model", "largest", "paper"])
def test_choices_of_a_request_live_and_die_together(kind: str) -> None:
    driver = CoreDriver(max_num_seqs=1, early_abort=kind, first_token_slo_s=1.0)
    ids = [driver.generate([n] * 3, n=3, max_tokens=40) for n in (1, 2)]
    driver.step()
    driver.now_s += 5.0  # all that wait are late, but the request of the one that runs has begun
    driver.run()
    [refused] = driver.failures
    assert type(driver.failures[refused]) is FirstTokenTooLate
    [served] = set(ids) - {refused}
    for index in range(3):
        driver.expect(served, [ids.index(served) + 1] * 3, index=index, max_tokens=40)
    driver.expect_clean()


def test_a_request_may_bring_an_objective_of_its_own() -> None:
    driver = CoreDriver(max_num_seqs=1, early_abort="model", first_token_slo_s=1.0)

    def submit(request_id: str, slo_s: float | None) -> None:
        driver.core.submit(
            Generate(request_id=request_id, prompt_token_ids=[1, 2], first_token_slo_s=slo_s,
                     params={"max_tokens": 30, "temperature": 0.0, "ignore_eos": True})
        )  # fmt: skip

    submit("first", None)
    driver.step()
    submit("patient", 1e6)
    submit("usual", None)
    for bad in (0.0, -1.0, math.inf, math.nan):
        submit(f"bad {bad}", bad)
    driver.now_s += 3.0
    driver.run()
    assert type(driver.failures.pop("usual")) is FirstTokenTooLate
    assert driver.answers["patient", 0].finish_reason == "length"
    assert len(driver.failures) == 4
    for error in driver.failures.values():
        assert isinstance(error, InvalidRequest) and error.param == "first_token_slo_s"


def test_a_late_request_leaves_nothing_whatever_holds_it_back() -> None:
    driver = CoreDriver(num_pages=14, page_size=2, max_num_seqs=2, early_abort="model",
                        first_token_slo_s=0.3, max_model_len=20)  # fmt: skip
    for content in (1, 2, 3):
        driver.loaded(f"a{content}", f"{content}:4")
    for n in range(40):
        driver.generate([n] * 5, f"a{n % 3 + 1}", max_tokens=6)
    driver.run()
    assert len(driver.failures) > 10
    driver.expect_clean()
    assert driver.core.stats()["num_leases"] == 0


# --- what is counted ---


def test_attainment_and_satisfaction_are_those_of_the_requests_outcomes() -> None:
    driver = TimedDriver(first_token_slo_s=SLO_S, early_abort="model")
    ids = driver.play(trace(1.3 * saturated_rate(), 10.0))
    counts = driver.core.stats()["first_token_slo"]
    firsts = [driver.first_token_after_s.get(request_id) for request_id in ids]
    assert counts["requests"] == len(ids)
    assert counts["aborted"] == firsts.count(None) == len(driver.failures) > 0
    assert counts["attainment"] == pytest.approx(driver.attainment(ids, SLO_S))
    satisfied = sum(max(0, 1 - (first / SLO_S) ** 2) for first in firsts if first is not None)
    assert counts["satisfaction"] == pytest.approx(satisfied / len(ids))


def test_who_gives_up_within_the_objective_is_not_counted_and_who_waits_longer_is() -> None:
    driver = CoreDriver(max_num_seqs=1, first_token_slo_s=1.0)
    driver.generate([1], max_tokens=50)
    soon, late = driver.generate([2], max_tokens=3), driver.generate([3], max_tokens=3)
    driver.step()
    driver.core.submit(Abort(request_id=soon))
    driver.step()
    driver.now_s += 2.0
    driver.core.submit(Abort(request_id=late))
    driver.run()
    counts = driver.core.stats()["first_token_slo"]
    assert (counts["requests"], counts["attained"], counts["aborted"]) == (2, 1, 0)


def test_without_an_objective_nothing_is_judged() -> None:
    driver = CoreDriver()
    driver.generate([1], max_tokens=5)
    driver.run()
    assert driver.core.stats()["first_token_slo"]["requests"] == 0


# --- the paper's rule ---


class Original:
    """The paper's queue, after its description: newest request at the head of a list."""

    def __init__(self, slo_s: float) -> None:
        self.slo_s = slo_s
        self.waiting: deque[tuple[float, int]] = deque()  # (arrival, tag), newest first
        self.rate = self.bs = 1
        self.num_left = 0

    def attempt(self, now_s: float, num_fit: int) -> tuple[list[int], list[int]]:
        """Tags dropped, and tags admitted."""
        self.rate = int(0.7 * (len(self.waiting) - self.num_left) + 0.3 * self.rate)
        dropped = [tag for at, tag in self.waiting if now_s - at + 0.5 >= self.slo_s]
        self.waiting = deque((at, tag) for at, tag in self.waiting if tag not in dropped)
        order = list(self.waiting) if self.rate >= self.bs else list(reversed(self.waiting))
        admitted = [tag for _, tag in order[:num_fit]]
        self.waiting = deque((at, tag) for at, tag in self.waiting if tag not in admitted)
        if admitted:
            self.num_left = len(self.waiting)
            self.bs = max(int(0.7 * len(admitted) + 0.3 * self.bs), 1)
        return dropped, admitted


@pytest.mark.parametrize("seed", range(20))
def test_the_papers_rule_is_the_papers(seed: int) -> None:
    choose = random.Random(seed)
    ours, original = PaperAbort(), Original(slo_s=4.0)
    now_s, tag = 0.0, 0
    num_dropped, orders = 0, set()
    for _ in range(400):
        now_s += choose.choice([0.0625, 0.25, 1.0])  # exact in binary, so both agree
        for _ in range(choose.choice([0, 0, 1, 2, 6])):
            tag += 1
            ours.add(Sequence("r", 0, [1], SamplingParams(), 5, frozenset(), 0, tag, None, now_s,
                              deadline_s=now_s + 4.0))  # fmt: skip
            original.waiting.appendleft((now_s, tag))
        num_fit = choose.choice([0, 0, 1, 1, 2, 5])
        dropped, admitted = original.attempt(now_s, num_fit)
        late = [found.sequence for found in ours.too_late(now_s)]
        for sequence in late:
            ours.remove(sequence)
        assert sorted(s.tag for s in late) == sorted(dropped)
        assert ours.rate == original.rate
        orders.add(ours.is_newest_first)
        taken = []
        while len(taken) < num_fit and (first := ours.first()) is not None:
            assert next(ours.in_order(())) is first
            ours.admit(first, 0)
            taken.append(first.tag)
        assert taken == admitted
        num_dropped += len(dropped)
    assert num_dropped > 20 and orders == {False, True}


def test_the_papers_rule_serves_the_newest_first_when_requests_outrun_admission() -> None:
    hand = ByHand(max_num_seqs=1, early_abort="paper", first_token_slo_s=1e9)
    sequences = [hand.add(2, max_output=3) for _ in range(6)]
    assert hand.scheduler.too_late() == []
    assert hand.schedule().rows[0].sequence is sequences[-1]


# --- settings ---


def test_settings_that_cannot_work_are_refused_by_name() -> None:
    from sloraj.config import EngineConfig

    for field, settings in (
        ("early_abort", {"early_abort": "model"}),  # late for what?
        ("early_abort", {"early_abort": "sometimes", "first_token_slo_s": 1.0}),
        ("early_abort", {"early_abort": "paper", "first_token_slo_s": 1.0, "queue_order": "vtc"}),
        ("early_abort", {"early_abort": "paper", "first_token_slo_s": 1.0, "cluster_adapters": 4}),
        ("first_token_slo_s", {"first_token_slo_s": 0.0}),
        ("first_token_slo_s", {"first_token_slo_s": math.inf}),
        ("retention", {"retention": "random"}),
    ):
        with pytest.raises(ConfigError) as caught:
            EngineConfig(model="m", **settings)  # type: ignore[arg-type]
        assert caught.value.param == field and field in caught.value.message
    EngineConfig(model="m", early_abort="model", first_token_slo_s=1.0, queue_order="vtc")
