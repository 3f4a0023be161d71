"""Laws of the scheduler: what it chooses. What it hands out wrongly, the fake device sees."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from sloraj.batch import SampledToken, ScheduledBatch, StepResult
from sloraj.messages import Abort, GetStats
from sloraj.request import SamplingParams, Sequence, SequenceState
from tests.sloraj.core_driver import CoreDriver


class ByHand:
    """A scheduler without a core: its steps are enqueued and read as the test says."""

    def __init__(self, **changes: Any) -> None:
        self.driver = CoreDriver(**changes)
        self.scheduler = self.driver.core._scheduler
        self.tags = itertools.count(1)

    def add(self, num_prompt: int, max_output: int = 100, **params: Any) -> Sequence:
        sequence = Sequence(
            request_id="r",
            index=0,
            prompt_token_ids=[1] * num_prompt,
            params=SamplingParams(**params),
            max_output_tokens=max_output,
            stop_ids=frozenset({7}),
            seed=0,
            tag=next(self.tags),
            version_id=None,
            arrival_s=0.0,
        )
        self.scheduler.add(sequence)
        return sequence

    def schedule(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        assert isinstance(batch, ScheduledBatch)
        return batch

    def read(self, batch: ScheduledBatch, token: int = 3) -> None:
        rows = [row for row in batch.rows if row.samples]
        tokens = tuple(SampledToken(row.sequence, token, True) for row in rows)
        self.scheduler.update(StepResult(batch.step, tokens))
        self.scheduler.check_integrity()


def test_decode_comes_first_then_chunks_oldest_first_within_the_budget() -> None:
    hand = ByHand(max_num_batched_tokens=8, num_pages=60)
    first = hand.add(3)
    hand.read(hand.schedule())
    second, third = hand.add(9), hand.add(5)
    batch = hand.schedule()
    assert [(r.sequence, r.start, r.num_tokens, r.samples) for r in batch.rows] == [
        (first, 3, 1, True),
        (second, 0, 7, False),
    ]
    hand.read(batch)
    batch = hand.schedule()
    assert [(r.sequence, r.start, r.num_tokens, r.samples) for r in batch.rows] == [
        (first, 4, 1, True),
        (second, 7, 2, True),
        (third, 0, 5, True),
    ]
    assert batch.num_tokens == 8 and not batch.is_decode


def test_a_remainder_of_one_token_counts_among_the_single_tokens() -> None:
    hand = ByHand(max_num_batched_tokens=8, num_pages=60)
    first = hand.add(9)
    hand.read(hand.schedule())
    second = hand.add(4)
    batch = hand.schedule()
    assert [(r.sequence, r.num_tokens) for r in batch.rows] == [(first, 1), (second, 4)]
    third = hand.add(20)
    hand.read(batch)
    batch = hand.schedule()
    assert [(r.sequence, r.num_tokens) for r in batch.rows] == [(first, 1), (second, 1), (third, 6)]


EDGES = {"max_num_batched_tokens": 1024, "token_buckets": (128, 256, 512, 1024)}


@pytest.mark.parametrize(
    ("num_decoding", "prompts", "expected"),
    [
        (0, (300,), 300),  # alone: a second step would read all the weights once more
        (1, (270,), 256),  # 15 tokens ride with the next step's decoding
        (1, (400,), 256),  # two steps of 256 cost what one of 512 does, and decode in both
        (1, (480,), 481),  # little padding is let be
        (1, (100,), 101),  # below the first bucket there is nothing to cut to
        (1, (150, 150), 256),
        (1, (400, 400, 400), 1024),
        (3, (254,), 256),  # the last token waits
    ],
)
def test_chunks_are_cut_to_a_bucket_where_the_next_step_takes_the_rest_for_less(
    num_decoding: int, prompts: tuple[int, ...], expected: int
) -> None:
    hand = ByHand(num_pages=1000, max_num_seqs=8, max_model_len=1024, **EDGES)
    for _ in range(num_decoding):
        hand.add(3)
    if num_decoding:
        hand.read(hand.schedule())
    for num_prompt in prompts:
        hand.add(num_prompt)
    batch = hand.schedule()
    assert batch.num_tokens == expected
    assert sum(row.num_tokens == 1 for row in batch.rows) >= num_decoding
    while sum(s.num_computed_tokens for s in hand.scheduler._running) < sum(prompts):
        hand.read(batch)
        batch = hand.schedule()
    assert hand.scheduler.num_running == num_decoding + len(prompts)


def test_one_step_runs_ahead_of_the_tokens_read() -> None:
    hand = ByHand()
    sequence = hand.add(3)
    first = hand.schedule()
    second = hand.schedule()
    assert (second.rows[0].start, second.rows[0].num_tokens) == (3, 1)
    assert (sequence.num_known_tokens, second.rows[0].samples) == (3, True)
    hand.read(first)
    assert (sequence.num_known_tokens, sequence.num_in_flight) == (4, 1)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_no_token_past_the_last_is_ever_computed(is_ahead: bool) -> None:
    hand = ByHand()
    sequence = hand.add(5, max_output=4)
    enqueued = None
    for _ in range(20):
        batch = hand.scheduler.schedule()
        if not is_ahead and isinstance(batch, ScheduledBatch):
            hand.read(batch)
        elif enqueued is not None:
            hand.read(enqueued)
        enqueued = batch if isinstance(batch, ScheduledBatch) and is_ahead else None
    assert sequence.state is SequenceState.FINISHED
    assert len(sequence.output_token_ids) == 4
    assert hand.scheduler.num_computed_tokens == 5 + 4 - 1


def test_a_stop_seen_late_drops_the_token_after_it_and_frees_at_once() -> None:
    hand = ByHand(num_pages=10)
    sequence = hand.add(4)
    first, second = hand.schedule(), hand.schedule()
    hand.read(first, token=7)
    assert sequence.state is SequenceState.FINISHED
    assert hand.driver.core.stats()["num_pages_free"] == 9
    hand.read(second)
    assert sequence.output_token_ids == []


def test_a_stop_id_before_min_tokens_is_a_plain_token() -> None:
    hand = ByHand()
    sequence = hand.add(4, min_tokens=2)
    for _ in range(2):
        hand.read(hand.schedule(), token=7)
    assert (sequence.state, sequence.output_token_ids) == (SequenceState.RUNNING, [7, 7])
    hand.read(hand.schedule(), token=7)
    assert (sequence.state, sequence.output_token_ids) == (SequenceState.FINISHED, [7, 7])


def test_a_preempted_sequence_waits_for_its_token_in_flight() -> None:
    hand = ByHand(num_pages=5, page_size=4)  # 4 usable
    old, new = hand.add(7), hand.add(3)
    hand.read(hand.schedule())  # 8 and 4 tokens: 2 + 1 pages
    enqueued = hand.schedule()
    assert hand.scheduler.num_running == 2
    batch = hand.schedule()  # both want a page, one is free
    assert [row.sequence for row in batch.rows] == [old]
    assert (new.state, new.pages, new.row, new.num_preemptions) == (
        SequenceState.WAITING, [], None, 1,
    )  # fmt: skip
    assert (new.num_in_flight, len(new.output_token_ids)) == (1, 1)
    hand.scheduler.check_integrity()
    hand.scheduler.abort(old)  # there is room again, but the token is not known yet
    assert hand.scheduler.schedule() is None
    hand.read(enqueued)
    row = hand.schedule().rows[0]
    assert (row.sequence, row.start, row.num_tokens, row.is_reset) == (new, 0, 5, True)
    assert (new.num_in_flight, len(new.output_token_ids)) == (1, 2)


def test_a_preempted_sequence_may_end_by_the_token_in_flight() -> None:
    hand = ByHand(num_pages=5, page_size=4)
    old, new = hand.add(7), hand.add(3)
    hand.read(hand.schedule())
    enqueued = hand.schedule()
    hand.schedule()
    assert new.state is SequenceState.WAITING
    hand.read(enqueued, token=7)
    assert (new.state, old.state) == (SequenceState.FINISHED, SequenceState.FINISHED)
    assert hand.scheduler.is_idle


def test_a_sequence_makes_room_while_its_last_token_is_in_flight() -> None:
    hand = ByHand(max_num_seqs=1)
    first, second = hand.add(3, max_output=2), hand.add(5)
    hand.read(hand.schedule())
    last = hand.schedule()
    batch = hand.schedule()
    assert [row.sequence for row in batch.rows] == [second]
    assert (first.state, first.pages, first.row) == (SequenceState.ENDING, [], None)
    hand.scheduler.check_integrity()
    hand.read(last)
    assert (first.state, len(first.output_token_ids)) == (SequenceState.FINISHED, 2)


def test_what_is_aborted_with_its_last_token_in_flight_says_nothing_more() -> None:
    hand = ByHand()
    sequence = hand.add(3, max_output=1)
    enqueued = hand.schedule()
    assert hand.scheduler.schedule() is None
    assert sequence.state is SequenceState.ENDING
    hand.scheduler.abort(sequence)
    result = StepResult(enqueued.step, (SampledToken(sequence, 3, True),))
    assert hand.scheduler.update(result) == []
    assert sequence.state is SequenceState.FINISHED
    hand.scheduler.check_integrity()


def test_a_preempted_sequence_computes_all_its_tokens_again_in_a_fresh_row() -> None:
    hand = ByHand(num_pages=5, page_size=4)
    old, new = hand.add(7), hand.add(3)
    for _ in range(3):
        hand.read(hand.schedule())
    assert new.state is SequenceState.WAITING and len(new.output_token_ids) == 2
    hand.scheduler.abort(old)
    row = hand.schedule().rows[0]
    assert (row.sequence, row.is_reset, row.first_new_page) == (new, True, 0)
    assert (row.start, row.num_tokens, row.samples) == (0, 5, True)


def test_none_is_admitted_into_the_pages_that_running_sequences_need_next() -> None:
    hand = ByHand(num_pages=4, page_size=4)  # 3 usable
    old = hand.add(7)
    hand.read(hand.schedule())  # 2 pages; the token after the next takes the third
    hand.add(2)
    for _ in range(3):
        batch = hand.schedule()
        assert [row.sequence for row in batch.rows] == [old]
        hand.read(batch)
    assert len(old.pages) == 3
    assert hand.scheduler.num_preemptions == 0


def test_a_long_prompt_takes_no_token_from_those_that_decode() -> None:
    hand = ByHand(max_num_batched_tokens=8, num_pages=60)
    first = hand.add(3)
    hand.read(hand.schedule())
    second = hand.add(30)
    for step in range(4):
        batch = hand.schedule()
        rows = [(row.sequence, row.start, row.num_tokens) for row in batch.rows]
        assert rows == [(first, 3 + step, 1), (second, 7 * step, 7)]
        hand.read(batch)


def test_the_newest_gives_way_and_the_oldest_never_does() -> None:
    driver = CoreDriver(num_pages=9, page_size=2, max_num_seqs=4, max_model_len=17)
    ids = [driver.generate([n, n], max_tokens=14) for n in range(4)]
    finished: list[str] = []
    while len(finished) < len(ids):
        driver.step()
        for request_id in ids:
            answer = driver.answers.get((request_id, 0))
            if request_id not in finished and answer is not None and answer.finish_reason:
                finished.append(request_id)
    driver.run()
    assert finished == ids  # first come, first finished
    assert driver.ask(GetStats)["preemptions"] > 0
    for n, request_id in enumerate(ids):
        driver.expect(request_id, [n, n], max_tokens=14)


def test_the_head_of_the_queue_is_not_overtaken_by_what_would_fit() -> None:
    driver = CoreDriver(num_pages=17, page_size=2, max_num_seqs=8, max_model_len=32)
    driver.generate([1] * 8, max_tokens=8)
    driver.step()
    driver.runner.keep_batches = True
    large = driver.generate([2] * 24, max_tokens=6)
    for n in range(20):
        driver.generate([n], max_tokens=4)
    driver.run()
    driver.expect(large, [2] * 24, max_tokens=6)
    rows = [row for batch in driver.runner.batches for row in batch.rows if row.is_reset]
    assert [row.sequence.request_id for row in rows].index(large) == 0


def test_idle_adapters_give_way_to_tokens() -> None:
    driver = CoreDriver(num_pages=22, page_size=2, max_model_len=40)
    for content in range(1, 5):
        driver.loaded(f"a{content}", f"{content}:5")
        driver.generate([content], f"a{content}", max_tokens=1)
        driver.run()
    stats = driver.ask(GetStats)
    assert (stats["num_pages_free"], stats["num_pages_adapters_idle"]) == (1, 20)
    request_id = driver.generate([9] * 3, max_tokens=35)
    driver.run()
    driver.expect(request_id, [9] * 3, max_tokens=35)
    stats = driver.ask(GetStats)
    assert (stats["adapter_evictions"], stats["preemptions"]) == (4, 0)


def test_a_new_adapter_waits_while_tokens_fill_the_pool_and_then_takes_their_pages() -> None:
    driver = CoreDriver(num_pages=13, page_size=2, max_model_len=24)
    driver.loaded("a", "1:6")
    driver.generate([3] * 14, max_tokens=6)
    driver.step()
    request_id = driver.generate([4], "a", max_tokens=5)
    driver.step()
    assert driver.core.stats()["num_adapters_resident"] == 0
    assert driver.core.stats()["num_waiting"] == 1
    driver.run()
    driver.expect(request_id, [4], content=1, max_tokens=5)
    assert driver.ask(GetStats)["num_pages_adapters"] == 6


def test_installs_of_one_step_stay_within_their_bound_but_one_always_goes() -> None:
    driver = CoreDriver(
        num_pages=200, max_num_seqs=8, max_adapter_slots=8, install_pages_per_step=6
    )
    driver.runner.keep_batches = True
    for content, num_pages in ((1, 9), (2, 3), (3, 3), (4, 4)):
        driver.loaded(f"a{content}", f"{content}:{num_pages}")
    ids = [driver.generate([5], f"a{c}", max_tokens=3) for c in (1, 1, 2, 3, 2, 4)]
    driver.run()
    installed = [[len(i.pages) for i in b.installs] for b in driver.runner.batches]
    assert [pages for pages in installed if pages] == [[9], [3, 3], [4]]
    assert len(driver.runner.batches[0].rows) == 2  # what is resident needs no install
    for content, request_id in zip((1, 1, 2, 3, 2, 4), ids, strict=True):
        driver.expect(request_id, [5], content, max_tokens=3)


def test_an_abort_frees_exactly_once_whatever_the_state() -> None:
    driver = CoreDriver(num_pages=20, max_num_seqs=2)
    driver.loaded("a", "1:3")
    ids = [driver.generate([n] * 20, "a", max_tokens=9) for n in range(4)]
    for _ in range(3):
        driver.step()
    for request_id in (ids[0], ids[3], ids[0], "never seen"):
        driver.core.submit(Abort(request_id=request_id))
    driver.step()
    assert driver.core.stats()["num_requests"] == 2
    driver.run()
    driver.core.submit(Abort(request_id=ids[1]))  # finished
    driver.run()
    driver.expect(ids[1], [1] * 20, 1, max_tokens=9)
    driver.expect(ids[2], [2] * 20, 1, max_tokens=9)
    assert not driver.answers.get((ids[3], 0))
    assert driver.ask(GetStats)["aborted_requests"] == 2
    driver.expect_clean()


@hypothesis.given(
    prompts=st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=20), min_size=1, max_size=6),
    budget=st.integers(5, 40),
    page_size=st.sampled_from([1, 2, 4, 16]),
    spare_pages=st.integers(0, 12),
    max_tokens=st.integers(1, 12),
)
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
def test_answers_do_not_depend_on_chunks_pages_or_preemption(
    prompts: list[list[int]], budget: int, page_size: int, spare_pages: int, max_tokens: int
) -> None:
    needed = -(-(max(map(len, prompts)) + max_tokens) // page_size) + 2  # 2: the adapter
    driver = CoreDriver(
        num_pages=1 + needed + spare_pages, page_size=page_size, max_num_batched_tokens=budget
    )
    driver.loaded("a", "3:2")
    names = [None if len(prompt) % 2 else "a" for prompt in prompts]
    ids = [
        driver.generate(prompt, name, max_tokens=max_tokens)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    driver.run()
    for request_id, prompt, name in zip(ids, prompts, names, strict=True):
        driver.expect(request_id, prompt, 3 if name else 0, max_tokens=max_tokens)
    driver.expect_clean()


def test_the_adapter_of_one_that_waits_is_sent_beside_the_step_before() -> None:
    driver = CoreDriver(max_num_seqs=1, num_pages=60)
    driver.runner.keep_batches = True
    for content in (1, 2, 3):
        driver.loaded(f"a{content}", f"{content}:2")
    for content in (1, 2, 3):
        driver.generate([1, 2, 3], f"a{content}", max_tokens=4)
    driver.run()
    batches = driver.runner.batches
    first = batches[0]
    assert len(first.installs) == 1 and len(first.sends) == 2
    assert batches[1].installs == first.sends
    assert not any(batch.installs or batch.sends for batch in batches[2:])
    assert driver.core.stats()["adapter_installs"] == 3
    driver.expect_clean()


def test_nothing_is_sent_that_running_sequences_would_soon_have_to_evict() -> None:
    driver = CoreDriver(max_num_seqs=1, num_pages=10)  # 9 pages: the adapters do not fit together
    driver.runner.keep_batches = True
    for content in (1, 2):
        driver.loaded(f"a{content}", f"{content}:4")
    for content in (1, 2):
        driver.generate([1, 2, 3], f"a{content}", max_tokens=4)
    driver.run()
    assert not any(batch.sends for batch in driver.runner.batches)
    driver.expect_clean()
