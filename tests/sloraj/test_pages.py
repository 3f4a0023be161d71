"""Laws of the page allocator."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sloraj.errors import InternalError
from sloraj.pages import NO_OWNER, NULL_PAGE, PagePool

NUM_PAGES = 12


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain dictionary of what it must hold: page -> (owner, references)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.held: dict[int, tuple[int, int]] = {}

    @rule(num_pages=st.integers(0, NUM_PAGES), owner=st.integers(1, 4))
    def allocate(self, num_pages: int, owner: int) -> None:
        num_free = NUM_PAGES - 1 - len(self.held)
        pages = self.pool.allocate(num_pages, owner)
        if num_pages > num_free:
            assert pages is None
            return
        assert pages is not None and len(set(pages)) == num_pages
        assert NULL_PAGE not in pages and not set(pages) & set(self.held)
        self.held |= {page: (owner, 1) for page in pages}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.share([page])
        owner, references = self.held[page]
        self.held[page] = (owner, references + 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        owner, references = self.held.pop(page)
        self.pool.free([page], owner)
        if references > 1:
            self.held[page] = (owner, references - 1)

    @rule(page=st.integers(0, NUM_PAGES - 1), owner=st.integers(0, 4))
    def free_what_is_anothers(self, page: int, owner: int) -> None:
        if page not in self.held or self.held[page][0] != owner:
            with pytest.raises(InternalError):
                self.pool.free([page], owner)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free == NUM_PAGES - 1 - len(self.held)
        for page in range(NUM_PAGES):
            assert self.pool.owner_of(page) == self.held.get(page, (NO_OWNER, 0))[0]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = hypothesis.settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(6)
    assert pool.allocate(6, owner=1) is None
    assert pool.num_free == 5
    assert sorted(pool.allocate(5, owner=1) or []) == [1, 2, 3, 4, 5]
    assert pool.allocate(1, owner=2) is None
    assert pool.allocate(0, owner=2) == []


def test_freed_pages_return_exactly_once() -> None:
    pool = PagePool(6)
    pages = pool.allocate(3, owner=1)
    assert pages is not None
    pool.free(pages, owner=1)
    with pytest.raises(InternalError, match="freed by 1, owned by 0"):
        pool.free(pages, owner=1)
    assert pool.num_free == 5
    pool.check_integrity()


def test_a_free_page_cannot_be_shared() -> None:
    pool = PagePool(4)
    with pytest.raises(InternalError, match="cannot be shared"):
        pool.share([1])


@pytest.mark.parametrize("num_pages", [0, 1])
def test_a_pool_has_a_page_besides_the_null_page(num_pages: int) -> None:
    with pytest.raises(InternalError, match="num_pages"):
        PagePool(num_pages)
