"""Laws of what stays on the device and what goes."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from sloraj.adapters.host_store import AdapterVersion, HostStore
from sloraj.adapters.idle_versions import IdleVersions
from sloraj.adapters.residency import Residency
from sloraj.adapters.retention import (
    ExpectedReloadCost,
    LeastRecentlyUsed,
    RetentionPolicy,
    RunningBatchOnly,
)
from sloraj.errors import CapacityError, InternalError
from sloraj.pages import PagePool
from tests.sloraj.fake_runner import packed_adapter


class Device:
    """A residency over a pool of `num_pages` usable pages, with a clock to turn."""

    def __init__(
        self,
        num_pages: int = 10,
        num_slots: int = 4,
        policy: RetentionPolicy | None = None,
        num_reserved_pages: int | None = None,
    ) -> None:
        self.now_s = 1000.0
        self.pool = PagePool(num_pages + 1)
        self.residency = Residency(
            self.pool, num_slots, lambda: self.now_s, policy, num_reserved_pages=num_reserved_pages
        )
        self._tags = itertools.count(1)

    def version(self, content: int, num_pages: int) -> AdapterVersion:
        return AdapterVersion(packed_adapter(content, num_pages), next(self._tags))

    def use(self, version: AdapterVersion, times: int = 1) -> None:
        """Acquire and release, so that the version is resident and idle."""
        for _ in range(times):
            assert self.residency.fits(version, 0)
            self.residency.acquire(version)
            self.residency.release(version.version_id)
        self.residency.check_integrity()

    def residents(self, *versions: AdapterVersion) -> list[bool]:
        return [self.residency.is_resident(version.version_id) for version in versions]


def test_an_idle_version_stays_and_needs_no_second_install() -> None:
    device = Device()
    version = device.version(1, 4)
    slot, install = device.residency.acquire(version)
    assert install is not None and install.slot == slot == 1 and install.tag == version.tag
    assert {device.pool.owner_of(page) for page in install.pages} == {version.tag}
    device.residency.release(version.version_id)
    assert device.residency.acquire(version) == (slot, None)
    assert device.residency.num_installs == 1


def test_pinned_by_a_sequence_means_never_evicted() -> None:
    device = Device(num_pages=10)
    used, idle = device.version(1, 4), device.version(2, 4)
    device.residency.acquire(used)
    device.use(idle)
    assert not device.residency.evict_for(7)
    assert device.residents(used, idle) == [True, True]
    assert device.residency.evict_for(6)
    assert device.residents(used, idle) == [True, False]
    device.residency.check_integrity()


def test_in_a_fixed_split_neither_side_takes_a_page_of_the_other() -> None:
    device = Device(num_pages=10, num_reserved_pages=6)
    first, second, large = (device.version(i, pages) for i, pages in ((1, 4), (2, 4), (3, 7)))
    assert device.residency.fits(first, 4) and not device.residency.fits(first, 5)
    assert not device.residency.fits(large, 0)  # although ten pages are free
    device.use(first)
    assert not device.residency.evict_for(5)  # although the version is idle
    assert device.residents(first) == [True]
    assert device.pool.allocate(4, owner=99) is not None
    assert device.residency.evict_for(0) and not device.residency.evict_for(1)
    assert not device.residency.fits(None, 1)
    install = device.residency.prefetch(second, num_other_pages=4, keep=())
    assert install is not None and len(install.pages) == 4  # in the place of the first
    assert device.residents(first, second) == [False, True]
    device.residency.check_integrity()


def test_the_less_used_version_goes_first_whatever_was_used_last() -> None:
    device = Device(num_pages=8)
    popular, rare = device.version(1, 4), device.version(2, 4)
    device.use(popular, times=5)
    device.now_s += 1
    device.use(rare)
    assert device.residency.evict_for(1)
    assert device.residents(popular, rare) == [True, False]


def test_popularity_decays() -> None:
    device = Device(num_pages=8)
    once_popular, fresh = device.version(1, 4), device.version(2, 4)
    device.use(once_popular, times=5)
    device.now_s += 10 * ExpectedReloadCost().decay_s
    device.use(fresh)
    assert device.residency.evict_for(1)
    assert device.residents(once_popular, fresh) == [False, True]


def test_the_order_of_two_idle_versions_does_not_change_with_time() -> None:
    policy = ExpectedReloadCost(decay_s=10, decay_uses=math.inf)
    device = Device()
    first, second = device.version(1, 2), device.version(2, 2)
    for now_s in (0.0, 1.0, 2.0):
        policy.record_use(first, now_s)
    policy.record_use(second, 5.0)

    def rate(version: AdapterVersion, now_s: float) -> float:
        decay: float = 2.718281828459045 ** ((version.last_used_s - now_s) / 10)
        return version.use_weight * decay

    order = policy.keep_value(first) > policy.keep_value(second)
    assert all((rate(first, t) > rate(second, t)) == order for t in (5.0, 20.0, 300.0))


def test_equal_worth_falls_back_to_least_recently_used() -> None:
    policy = ExpectedReloadCost(
        decay_s=1e18, decay_uses=math.inf
    )  # so slow that both rates are equal
    device = Device()
    older, newer = device.version(1, 2), device.version(2, 2)
    policy.record_use(older, 1.0)
    policy.record_use(newer, 2.0)
    assert policy.keep_value(older) < policy.keep_value(newer)


def test_versions_loaded_as_pinned_go_last_but_go() -> None:
    device = Device(num_pages=8)
    pinned, popular = device.version(1, 4), device.version(2, 4)
    device.use(pinned)
    device.use(popular, times=9)
    pinned.num_pinned = 1
    device.residency.revalue(pinned)
    assert device.residency.evict_for(1)
    assert device.residents(pinned, popular) == [True, False]
    assert device.residency.evict_for(8)
    assert device.residents(pinned) == [False]


def test_a_full_slot_table_gives_up_an_idle_version_even_with_pages_free() -> None:
    device = Device(num_pages=10, num_slots=1)
    first, second = device.version(1, 2), device.version(2, 2)
    device.use(first)
    slot, install = device.residency.acquire(second)
    assert install is not None and slot == 1
    assert device.residents(first, second) == [False, True]
    assert not device.residency.fits(first, 0)  # the only slot is in use


def test_what_fits_can_be_acquired_and_what_does_not_fit_evicts_nothing() -> None:
    device = Device(num_pages=10)
    idle, own = device.version(1, 4), device.version(2, 4)
    device.use(idle)
    device.use(own)
    # 2 pages are free; `own` stays where it is, so only the 4 of `idle` can be had besides.
    assert device.residency.fits(own, 6) and not device.residency.fits(own, 7)
    assert device.residency.fits(None, 10) and not device.residency.fits(None, 11)
    assert not device.residency.evict_for(11)
    assert device.residents(idle, own) == [True, True]
    device.residency.acquire(own)
    assert device.residency.evict_for(6)
    assert device.residents(idle, own) == [False, True]


def test_faults_of_ours_are_told() -> None:
    device = Device()
    version = device.version(1, 2)
    device.residency.acquire(version)
    with pytest.raises(InternalError, match="in use"):
        device.residency.drop(version)
    device.residency.release(version.version_id)
    with pytest.raises(InternalError, match="more often"):
        device.residency.release(version.version_id)
    device.residency.drop(version)
    assert device.pool.num_free == 10


def test_the_host_store_keeps_one_copy_within_its_limit() -> None:
    store = HostStore(max_bytes=40, next_tag=itertools.count(1).__next__)
    version = store.add(packed_adapter(1, 3))  # 24 bytes
    assert store.add(packed_adapter(1, 3)) is version
    with pytest.raises(CapacityError, match=r"24 bytes .* 24 of 40 .*--host-adapter-bytes"):
        store.add(packed_adapter(2, 3))
    assert (len(store), store.num_bytes) == (1, 24)
    store.drop(version)
    again = store.add(packed_adapter(1, 3))
    assert again.tag != version.tag
    store.check_integrity()


def test_what_is_prefetched_is_idle_until_it_is_acquired_and_counts_as_used_once() -> None:
    device = Device()
    version, twin = device.version(1, 4), device.version(2, 4)
    install = device.residency.prefetch(version, 0, ())
    assert install is not None
    assert {device.pool.owner_of(page) for page in install.pages} == {version.tag}
    device.residency.check_integrity()
    assert device.residency.num_pins(version.version_id) == 0
    assert device.residency.prefetch(version, 0, ()) is None
    assert device.residency.acquire(version) == (install.slot, None)
    device.residency.acquire(twin)
    assert version.use_weight == twin.use_weight == 1.0
    device.residency.acquire(version)
    assert version.use_weight == pytest.approx(2.0, rel=1e-3)  # the first use is a little old


def test_a_prefetch_evicts_the_least_valued_but_none_that_is_kept_or_pinned() -> None:
    device = Device(num_pages=12, num_slots=3)
    pinned, kept, idle, new = (device.version(i, 4) for i in range(1, 5))
    device.residency.acquire(pinned)
    device.use(kept)
    device.use(idle, times=5)
    assert device.residency.prefetch(new, 1, {kept.version_id}) is None  # no page is left beside it
    assert device.residents(pinned, kept, idle, new) == [True, True, True, False]
    assert device.residency.prefetch(new, 0, {kept.version_id}) is not None
    assert device.residents(pinned, kept, idle, new) == [True, True, False, True]
    device.residency.check_integrity()


# --- what the queue wants, and why versions go ---


def test_what_waiting_sequences_want_goes_after_what_none_wants() -> None:
    device = Device(num_pages=8)
    rare, popular = device.version(1, 4), device.version(2, 4)
    device.use(rare)
    device.use(popular, times=9)
    device.residency.want(rare.version_id)
    device.residency.want(rare.version_id)
    device.residency.unwant(rare.version_id)  # one still waits
    assert device.residency.evict_for(1)
    assert device.residents(rare, popular) == [True, False]
    device.use(popular)
    device.residency.unwant(rare.version_id)
    assert device.residency.evict_for(1)
    assert device.residents(rare, popular) == [False, True]
    assert device.residency.wanted == {}


def test_what_was_sent_ahead_outlasts_what_is_merely_wanted_but_never_blocks_tokens() -> None:
    device = Device(num_pages=8)
    popular, awaited = device.version(1, 4), device.version(2, 4)
    device.use(popular, times=9)
    for version in (popular, awaited):
        device.residency.want(version.version_id)
    assert device.residency.prefetch(awaited, 0, ()) is not None
    assert device.residency.evict_for(1)
    assert device.residents(popular, awaited) == [False, True]
    assert device.residency.evict_for(8)  # it is idle after all
    counts = device.residency.counts
    assert (counts.prefetched, counts.prefetched_used, counts.prefetched_wasted) == (1, 0, 1)


def test_uses_bytes_and_causes_are_counted() -> None:
    device = Device(num_pages=8, num_slots=2)
    first, second, third = device.version(1, 4), device.version(2, 4), device.version(3, 2)
    device.use(first, times=3)  # a miss and two hits
    assert device.residency.prefetch(second, 0, ()) is not None
    device.use(second, times=2)  # what was sent ahead, and a hit
    device.use(third)  # a miss that takes a slot
    assert device.residency.evict_for(8)
    device.use(first)
    assert device.pool.allocate(3, owner=99) is not None  # one page is left
    assert device.residency.prefetch(third, 0, ()) is not None
    size = {version: version.packed.num_bytes for version in (first, second, third)}
    reloaded = size[first] + size[third]
    assert device.residency.stats() == {
        "hits": 3, "misses": 3, "prefetched": 2, "prefetched_used": 1, "prefetched_wasted": 0,
        "loaded_bytes": sum(size.values()) + reloaded, "reloaded_bytes": reloaded,
        "evictions": {"tokens": 2, "adapter": 1, "prefetch": 1, "policy": 0},
    }  # fmt: skip
    assert device.residency.num_evictions == 4


def test_of_two_used_alike_the_smaller_stays() -> None:
    device = Device(num_pages=10)
    small, large = device.version(1, 2), device.version(2, 8)
    device.use(small)
    device.use(large)
    assert device.residency.evict_for(1)
    assert device.residents(small, large) == [True, False]


def test_least_recently_used_looks_at_the_last_use_alone() -> None:
    device = Device(num_pages=8, policy=LeastRecentlyUsed())
    popular, rare = device.version(1, 4), device.version(2, 4)
    device.use(popular, times=9)
    device.use(rare)
    device.residency.want(popular.version_id)
    assert device.residency.evict_for(1)
    assert device.residents(popular, rare) == [False, True]


def test_the_papers_rule_keeps_what_runs_and_what_was_sent_ahead_while_something_runs() -> None:
    device = Device(num_pages=10, policy=RunningBatchOnly())
    first, second, ahead, stale = (device.version(content, 2) for content in (1, 2, 3, 4))
    device.residency.acquire(first)
    device.residency.acquire(second)
    for version in (ahead, stale):
        device.residency.want(version.version_id)
        assert device.residency.prefetch(version, 0, ()) is not None
    device.residency.unwant(stale.version_id)  # its request has gone
    device.residency.release(first.version_id)
    assert device.residents(first, second, ahead, stale) == [False, True, True, False]
    device.residency.release(second.version_id)
    assert device.residents(second, ahead) == [False, False]
    assert device.residency.counts.evictions["policy"] == 4
    device.residency.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_idle_versions_go_in_the_order_of_their_values_whatever_happened_before(seed: int) -> None:
    choose, idle = random.Random(seed), IdleVersions()
    values: dict[str, tuple[float, ...]] = {}
    pages: dict[str, int] = {}
    for _ in range(2000):
        name = str(choose.randrange(30))
        if choose.random() < 0.6:
            values[name], pages[name] = (choose.randrange(8),), choose.randrange(1, 5)
            idle.add(name, values[name], pages[name])
        else:
            values.pop(name, None)
            idle.discard(name)
        assert len(idle) == len(values) and idle.num_pages == sum(pages[v] for v in values)
        order = sorted(values, key=lambda v: (values[v], v))
        if order:
            assert idle.least() == order[0]
        keep = {str(choose.randrange(30)) for _ in range(choose.randrange(20))}
        wanted = choose.randrange(20)
        expected: list[str] = []
        for version in order:
            if version not in keep and (not expected or sum(pages[v] for v in expected) < wanted):
                expected.append(version)
        is_enough = bool(expected) and sum(pages[v] for v in expected) >= wanted
        assert idle.going(wanted, keep) == (expected if is_enough else None)
