"""The one table of statuses covers the whole exception tree, in one shape."""

from __future__ import annotations

import pytest

from serving import errors as http_errors
from serving.errors import TABLE, describe, error_body, error_headers, shown
from sloraj import errors


def tree(root: type[BaseException]) -> list[type[BaseException]]:
    return [root, *(kind for child in root.__subclasses__() for kind in tree(child))]


@pytest.mark.parametrize("kind", tree(errors.SlorajError) + tree(http_errors.ProtocolError)[1:])
def test_every_error_has_a_row_of_its_own(kind: type[BaseException]) -> None:
    if kind.__module__ in ("sloraj.errors", "serving.errors"):
        assert kind in TABLE
    answer = describe(kind("what, got, allowed"))
    assert 400 <= answer.status < 600
    body = error_body(kind("what, got, allowed"))
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] == "what, got, allowed"
    assert isinstance(body["error"]["code"], str)


def test_an_error_added_later_inherits_its_parents_answer() -> None:
    class Later(errors.QueueFull):
        pass

    assert describe(Later("x")) == TABLE[errors.QueueFull]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequest("x"), 400),
        (errors.ContextTooLong("x"), 400),
        (errors.AdapterNotFound("x"), 404),
        (errors.AdapterLoadError("x"), 400),
        (errors.AdapterFilesNotFound("x"), 404),
        (errors.AdapterExists("x"), 400),
        (errors.AdapterBusy("x"), 409),
        (errors.QueueFull("x"), 503),
        (errors.FirstTokenTooLate("x"), 503),
        (errors.EngineUnavailable("x"), 503),
        (errors.InternalError("x"), 500),
        (ZeroDivisionError("x"), 500),
    ],
)
def test_statuses_are_the_documented_ones(error: Exception, status: int) -> None:
    assert describe(error).status == status


def test_unforeseen_exceptions_keep_their_text_to_themselves() -> None:
    assert "secret" not in error_body(ValueError("secret"))["error"]["message"]


def test_retry_headers_say_whether_a_second_try_helps() -> None:
    assert error_headers(errors.QueueFull("x", retry_after_s=2.2)) == {"retry-after": "3"}
    assert error_headers(errors.EngineUnavailable("x")) == {"retry-after": "1"}
    assert error_headers(errors.InternalError("x")) == {"x-should-retry": "false"}
    assert error_headers(errors.InvalidRequest("x")) == {}


def test_values_are_shown_short_and_on_one_line() -> None:
    assert shown("a\nb") == "'a\\nb'"
    assert shown(None) == "null" and shown(True) == "true" and shown(1.5) == "1.5"
    assert shown([1, 2]) == "a list of 2" and shown({}) == "an object of 0"
    assert len(shown("x" * 10**6)) == 80 and len(shown(10**39)) <= 80
