"""Laws of adapter names, versions and leases, seen through the core (rows 35 and 36)."""

from __future__ import annotations

import pytest

from sloraj.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterFilesNotFound,
    AdapterLoadError,
    AdapterNotFound,
    CapacityError,
    InternalError,
)
from sloraj.messages import Abort, GetStats, ListAdapters
from tests.sloraj.core_driver import CoreDriver


@pytest.mark.row(35)
def test_loading_a_taken_name_without_replace_is_refused_and_changes_nothing() -> None:
    driver = CoreDriver()
    driver.loaded("a", "1:3")
    call_id = driver.load("a", "2:3")
    request_id = driver.generate([1, 2], "a")
    driver.run()
    error = driver.replies[call_id]
    assert isinstance(error, AdapterExists) and "'a' is already loaded" in error.message
    driver.expect(request_id, [1, 2], content=1)
    assert driver.ask(GetStats)["num_adapter_versions"] == 1


@pytest.mark.row(35)
def test_one_content_under_two_names_shares_one_host_copy_and_one_slot() -> None:
    driver = CoreDriver()
    first, second = driver.loaded("a", "1:3"), driver.loaded("b", "1:3")
    assert first["version"] == second["version"] == "v1"
    ids = [driver.generate([5], name) for name in ("a", "b")]
    driver.run()
    for request_id in ids:
        driver.expect(request_id, [5], content=1)
    stats = driver.ask(GetStats)
    assert (stats["num_adapters"], stats["num_adapter_versions"]) == (2, 1)
    assert (stats["num_adapters_resident"], stats["adapter_installs"]) == (1, 1)
    call_id = driver.unload("a")
    driver.step()
    assert driver.replies[call_id] is None
    request_id = driver.generate([6], "b")
    driver.run()
    driver.expect(request_id, [6], content=1)
    assert driver.ask(GetStats)["adapter_installs"] == 1


@pytest.mark.row(35)
def test_a_running_request_keeps_its_version_across_a_reload_of_the_same_name() -> None:
    driver = CoreDriver()
    driver.loaded("a", "1:3")
    old = [driver.generate([n], "a", max_tokens=20) for n in range(6)]  # more than there are rows
    for _ in range(3):
        driver.step()
    assert driver.loaded("a", "2:4", replace=True)["version"] == "v2"
    new = driver.generate([9], "a", max_tokens=20)
    driver.step()
    stats = driver.ask(GetStats)
    assert (stats["num_adapters"], stats["num_adapters_draining"]) == (1, 1)
    driver.run()
    for n, request_id in enumerate(old):
        driver.expect(request_id, [n], content=1, max_tokens=20)
    driver.expect(new, [9], content=2, max_tokens=20)
    stats = driver.ask(GetStats)
    assert (stats["num_adapter_versions"], stats["num_adapters_draining"]) == (1, 0)
    assert stats["num_pages_adapters"] == 4


@pytest.mark.row(35)
def test_reloading_unchanged_content_keeps_the_version_and_its_place() -> None:
    driver = CoreDriver()
    driver.loaded("a", "1:3")
    driver.generate([1], "a", max_tokens=20)
    driver.step()
    assert driver.loaded("a", "1:3", replace=True)["version"] == "v1"
    driver.generate([2], "a")
    driver.run()
    assert driver.ask(GetStats)["adapter_installs"] == 1


@pytest.mark.row(36)
def test_unload_refuses_new_requests_at_once_and_replies_when_all_is_freed() -> None:
    driver = CoreDriver(max_num_seqs=1)
    driver.loaded("a", "1:3")
    running, queued = (driver.generate([n], "a", max_tokens=8) for n in (1, 2))
    driver.step()
    call_id = driver.unload("a")
    late = driver.generate([3], "a")
    driver.step()
    error = driver.failures[late]
    assert isinstance(error, AdapterNotFound) and "'a'" in error.message and error.param == "model"
    while call_id not in driver.replies:
        driver.step()
        answers = [driver.answers.get((request_id, 0)) for request_id in (running, queued)]
        done = all(answer is not None and answer.finish_reason for answer in answers)
        assert (call_id in driver.replies) == done
    assert driver.replies[call_id] is None
    stats = driver.core.stats()
    assert stats["num_pages_free"] == stats["num_pages"] and stats["num_adapter_versions"] == 0
    driver.expect(running, [1], content=1, max_tokens=8)
    driver.expect(queued, [2], content=1, max_tokens=8)
    driver.run()


@pytest.mark.row(36)
def test_unload_waits_for_the_versions_that_were_replaced_under_the_name() -> None:
    driver = CoreDriver()
    driver.loaded("a", "1:3")
    request_id = driver.generate([1], "a", max_tokens=10)
    driver.step()
    driver.loaded("a", "2:3", replace=True)
    call_id = driver.unload("a")
    driver.step()
    assert call_id not in driver.replies
    driver.core.submit(Abort(request_id=request_id))
    driver.step()
    assert driver.replies[call_id] is None


@pytest.mark.row(36)
def test_unloading_what_is_not_loaded_is_not_found_also_the_second_time() -> None:
    driver = CoreDriver()
    driver.loaded("a", "1:3")
    driver.generate([1], "a", max_tokens=10)
    driver.step()
    calls = [driver.unload("b"), driver.unload("a"), driver.unload("a")]
    driver.step()
    assert isinstance(driver.replies[calls[0]], AdapterNotFound)
    assert isinstance(driver.replies[calls[2]], AdapterNotFound)
    driver.run()
    assert driver.replies[calls[1]] is None


@pytest.mark.row(36)
def test_a_name_that_loads_or_unloads_is_busy() -> None:
    driver = CoreDriver()
    driver.executor.is_held = True
    loading = driver.load("a", "1:3")
    refused = [driver.load("a", "2:3", replace=True), driver.unload("a")]
    early = driver.generate([1], "a")
    driver.step()
    assert all(isinstance(driver.replies[call_id], AdapterBusy) for call_id in refused)
    assert isinstance(driver.failures[early], AdapterNotFound)
    driver.executor.release()
    driver.executor.is_held = False
    driver.step()
    assert driver.replies[loading]["version"] == "v1"
    request_id = driver.generate([1], "a", max_tokens=10)
    driver.step()
    unloading = driver.unload("a")
    during = driver.load("a", "1:3", replace=True)
    driver.step()
    assert isinstance(driver.replies[during], AdapterBusy)
    driver.run()
    assert driver.replies[unloading] is None
    driver.expect(request_id, [1], content=1, max_tokens=10)
    assert driver.loaded("a", "1:3")["version"] == "v1"


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("nonsense", AdapterLoadError, "bad path"),
        ("missing", AdapterFilesNotFound, "adapter 'x' at 'missing'"),
        ("damaged", AdapterLoadError, "adapter 'x' at 'damaged'"),
        ("unreadable", AdapterLoadError, "adapter 'x' at 'unreadable'"),
        ("fault", InternalError, "ZeroDivisionError"),
        ("2:3:96", AdapterLoadError, "rank 96 exceeds max_rank 64"),
        ("2:39", CapacityError, "39 pages, the pool has 39"),
        ("2:20", CapacityError, "160 bytes of host memory"),
    ],
)
def test_a_failed_load_says_why_and_leaves_the_name_as_it_was(
    path: str, error: type[Exception], said: str
) -> None:
    driver = CoreDriver(host_adapter_bytes=150)
    call_id = driver.load("x", path)
    driver.step()
    reply = driver.replies[call_id]
    assert type(reply) is error and said in str(reply)
    assert driver.ask(ListAdapters) == []
    driver.loaded("x", "1:3")
    replacing = driver.load("x", path, replace=True)
    request_id = driver.generate([1], "x")
    driver.run()
    assert type(driver.replies[replacing]) is error
    driver.expect(request_id, [1], content=1)


def test_a_listed_adapter_tells_where_it_is_and_who_holds_it() -> None:
    driver = CoreDriver()
    driver.loaded("a", "1:3:16", pinned=True)
    driver.loaded("b", "2:4")
    assert [info["state"] for info in driver.ask(ListAdapters)] == ["on_host", "on_host"]
    driver.generate([1], "a", max_tokens=10)
    driver.step()
    first, second = driver.ask(ListAdapters)
    assert first.pop("loaded_at") > 1e9
    assert first == {
        "adapter_id": "a", "path": "1:3:16", "version": "v1", "rank": 16, "num_pages": 3,
        "num_bytes": 24, "state": "on_device", "pinned": True, "num_leases": 1,
    }  # fmt: skip
    assert (second["state"], second["pinned"], second["num_leases"]) == ("on_host", False, 0)


def test_unloading_the_name_that_pinned_a_version_leaves_it_evictable_as_any_other() -> None:
    driver = CoreDriver(num_pages=13, max_model_len=40)
    driver.loaded("a", "1:4", pinned=True)
    driver.loaded("b", "1:4")
    driver.loaded("c", "2:4")
    for name in ("b", "c", "c", "c"):
        driver.generate([1], name, max_tokens=2)
        driver.run()
    call_id = driver.unload("a")
    driver.step()
    assert driver.replies[call_id] is None
    driver.generate([1] * 30, max_tokens=2)  # 8 pages, 4 are free
    driver.run()
    states = {info["adapter_id"]: info["state"] for info in driver.ask(ListAdapters)}
    assert states == {"b": "on_host", "c": "on_device"}
