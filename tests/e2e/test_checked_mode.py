"""The checked mode sees what it is there to see: batches that are wrong on purpose are counted.

They are handed to the runner directly; a scheduler does not make them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sloraj.batch import AdapterInstall, PackedAdapter, ScheduledBatch, ScheduledRow
from sloraj.request import SamplingParams, Sequence
from tests.checkpoints.fixtures import write_adapter
from tests.e2e.engine_driver import NUM_PAGES, PAGE_SIZE, Engine, EngineDriver
from tests.e2e.test_programs import prompt_of

Start = Callable[..., EngineDriver]
GREEDY = SamplingParams(temperature=0.0)
new_tag: Iterator[int] = itertools.count(500_000_000)  # no core's


class Hand:
    """Sequences on rows, with whatever pages and tags a test gives them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pages = itertools.count(NUM_PAGES // 2)

    def open(self, row: int, num_pages: int, slot: int = 0, adapter_tag: int = 0) -> ScheduledRow:
        """A new sequence on a row; its prompt leaves one place in the last page."""
        sequence = Sequence(
            request_id=f"row{row}", index=0, params=GREEDY, max_output_tokens=9, seed=0,
            prompt_token_ids=prompt_of(num_pages * PAGE_SIZE - 1, row), stop_ids=frozenset(),
            tag=next(new_tag), version_id=None, arrival_s=0.0, row=row, slot=slot,
            pages=[next(self.pages) for _ in range(num_pages)],
        )  # fmt: skip
        return ScheduledRow(
            sequence=sequence, row=row, slot=slot, adapter_tag=adapter_tag, start=0,
            num_tokens=sequence.num_prompt_tokens, first_new_page=0, is_reset=True, samples=True,
        )  # fmt: skip

    def next(self, row: ScheduledRow, stolen_page: int | None = None) -> ScheduledRow:
        """The token after a row's last one, in a page of another if one is given."""
        sequence, start = row.sequence, row.start + row.num_tokens
        sequence.output_token_ids.append(7)
        num_old = -(-start // PAGE_SIZE)
        if stolen_page is not None:
            assert start % PAGE_SIZE == 0
            sequence.pages.append(stolen_page)
        return ScheduledRow(
            sequence=sequence, row=row.row, slot=row.slot, adapter_tag=row.adapter_tag,
            start=start, num_tokens=1, first_new_page=num_old, is_reset=False, samples=True,
        )  # fmt: skip

    def packed(self, content: int) -> PackedAdapter:
        return self.engine.load(self.engine.adapters[content].path)[0]

    def install(self, slot: int, content: int) -> AdapterInstall:
        packed = self.packed(content)
        pages = tuple(next(self.pages) for _ in range(packed.num_pages))
        return AdapterInstall(slot, next(new_tag), pages, packed)

    def violations(self, *rows: ScheduledRow, installs: tuple[AdapterInstall, ...] = ()) -> int:
        runner = self.engine.runner
        return runner.collect(runner.execute(ScheduledBatch(0, rows, installs))).owner_violations


@pytest.fixture
def hand(engine: Engine) -> Hand:
    return Hand(engine)


def test_a_page_given_to_two_sequences_is_counted_for_the_one_that_lost_it(hand: Hand) -> None:
    victim, thief = hand.open(0, 3), hand.open(1, 2)
    assert hand.violations(victim, thief) == 0
    victim, thief = hand.next(victim), hand.next(thief)
    assert hand.violations(victim, thief) == 0  # the last place of their pages
    stolen = victim.sequence.pages[1]
    thief = hand.next(thief, stolen_page=stolen)
    assert hand.violations(thief) == 0  # the tag is its own now
    assert hand.violations(thief, hand.next(victim, stolen_page=next(hand.pages))) == 1


def test_a_page_read_after_it_was_given_away_is_counted_for_every_reader(hand: Hand) -> None:
    rows = [hand.open(row, 2) for row in range(4)]
    assert hand.violations(*rows) == 0
    heir = hand.open(9, 1)
    heir.sequence.pages[0] = rows[2].sequence.pages[0]
    assert hand.violations(heir) == 0
    assert hand.violations(*(hand.next(row) for row in rows)) == 1


def test_a_page_of_an_adapter_given_to_a_sequence_is_counted(hand: Hand) -> None:
    install = hand.install(slot=2, content=1)
    rows = [hand.open(row, 2, slot=2, adapter_tag=install.tag) for row in (0, 1)]
    base = hand.open(2, 2)
    assert hand.violations(*rows, base, installs=(install,)) == 0
    thief = hand.open(3, 1)
    thief.sequence.pages[0] = install.pages[-1]
    assert hand.violations(thief) == 0
    assert hand.violations(hand.next(base), *(hand.next(row) for row in rows)) == 2


def test_a_slot_bound_to_another_version_under_a_running_row_is_counted(hand: Hand) -> None:
    install = hand.install(slot=3, content=0)
    row = hand.open(0, 2, slot=3, adapter_tag=install.tag)
    assert hand.violations(row, installs=(install,)) == 0
    other = hand.install(slot=3, content=1)
    assert hand.violations(hand.next(row), installs=(other,)) == 1


def test_a_violation_ends_the_engine(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than answer with another's tokens."""
    driver = start()
    victim = driver.generate(prompt_of(12), max_tokens=30)
    for _ in range(4):
        driver.step()
    [running] = driver.core._scheduler._running
    monkeypatch.setattr(driver.core._pool, "allocate", lambda n, _: running.pages[:n])
    driver.generate(prompt_of(3), max_tokens=30)
    with pytest.raises(AssertionError, match="another's pages"):
        for _ in range(4):
            driver.step()
    assert victim in driver.failures


@pytest.mark.row(41)
@pytest.mark.parametrize(
    "targets, magnitude",
    [(("q_proj", "k_proj"), 1e30), (("up_proj", "down_proj"), 1e30)],
    ids=["scores", "residual"],
)
def test_logits_that_are_not_finite_fail_their_request_and_no_other(
    targets: tuple[str, ...], magnitude: float, engine: Engine, start: Start, tmp_path: Path
) -> None:
    """Finite weights that overflow on the way; the pages they leave full of NaN harm nobody."""
    write_adapter(
        tmp_path, engine.model_config, seed=1, ranks=2, targets=targets, magnitude=magnitude
    )
    driver = start(num_pages=60)
    version = driver.loaded("a", 2)
    driver.loaded_from("huge", str(tmp_path))
    for _ in range(2):  # the second time in pages that hold what the first has left
        neighbours = [
            driver.generate(prompt_of(9, i), "a" if i % 2 else None, max_tokens=12)
            for i in range(6)
        ]
        broken = driver.generate(prompt_of(30), "huge", max_tokens=12)
        driver.run()
        assert "not finite" in str(driver.failures[broken])
        for i, request in enumerate(neighbours):
            driver.check(request, 2 if i % 2 else None, version if i % 2 else None)
    driver.check_freed()
