"""Patterns from strangers match exactly as `re` does, in bounded time, or are refused."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import CheckpointError, InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.hf_weights import module_path
from checkpoints.model_config import TARGET_MODULES
from checkpoints.module_patterns import MatchBudget, ModulePattern

PATHS = [module_path(layer, module) for layer in range(12) for module in TARGET_MODULES]

# Patterns that trainers write; the fifth has the shape of Unsloth's default.
USUAL = [
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r".*\.layers\.(0|1|2|[3-9]|1\d)\..*_proj",
    r"^model\.layers\.([0-9]|1[0-9])\.mlp\.(gate|up|down)_proj$",
    r"(?:.*?(?:language|model).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|up_proj)))",
    r"(?!.*down).*_proj",
    r"(?=.*\b3\b)[^0-9]*\d+\D+",
    r".*\W\w+_proj\Z",
    r"(.*)*proj",
    r"(?:[a-z_]+\.?|\d\.)+",
    "q_proj",
    "layers.1.self_attn.q_proj",
    r"layers\.1\d?\.(self_attn|mlp)\.(q|up)_proj",
    "self_attn",
]
COSTLY_FOR_RE = [
    r"(.*)*x",
    r"(a+)+$",
    r"(?:(?:.+)+)+!",
    r"(?:mo|m|o|.)*x",
    r".*.*.*.*.*.*.*.*x",
    r"(?:.*a){30}",
    r"(.{1,50}){1,50}x",
    "(?:.|..)" * 60,
    "(" * 20 + ".*" + ")*" * 20 + "x",
]


def compiled(pattern: str, budget: MatchBudget | None = None) -> ModulePattern:
    return ModulePattern(pattern, budget or MatchBudget(), field="rank_pattern", where="f")


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_match_as_re_does(pattern: str) -> None:
    found = compiled(pattern)
    suffix = re.compile(rf"(.*\.)?({pattern})$")
    for path in PATHS:
        assert found.fullmatch(path) == bool(re.fullmatch(pattern, path))
        assert found.match_suffix(path) == bool(suffix.match(path))


_ATOMS = st.sampled_from(
    ["a", "b", r"\.", ".", r"\d", r"\w", "[^a]", "[a-b.]", "1", "^", "$", r"\b", r"\B", r"[\W\d]"]
)
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(
            inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?"])
        ).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=400)
@given(_PATTERNS, st.text("ab.1", min_size=1, max_size=7))
def test_random_patterns_match_as_re_does(pattern: str, path: str) -> None:
    found = compiled(pattern)
    assert found.fullmatch(path) == bool(re.fullmatch(pattern, path))
    assert found.match_suffix(path) == bool(re.match(rf"(.*\.)?({pattern})$", path))


@pytest.mark.row(26)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", COSTLY_FOR_RE)
def test_patterns_that_make_re_backtrack_take_bounded_time(pattern: str) -> None:
    started = time.process_time()
    found = compiled(pattern)
    with contextlib.suppress(UnsupportedCheckpoint):  # running out of budget is an answer too
        for path in PATHS:
            assert found.fullmatch(path) in (True, False)
            assert found.match_suffix(path) in (True, False)
    assert time.process_time() - started < 10


@pytest.mark.row(26)
def test_budget_is_shared_and_ends_in_a_refusal() -> None:
    budget = MatchBudget(20_000)
    first, second = compiled("(.*)*x", budget), compiled("(.*)*y", budget)
    with pytest.raises(UnsupportedCheckpoint, match="too costly") as caught:
        for path in PATHS:
            first.fullmatch(path)
            second.fullmatch(path)
    assert caught.value.field == "rank_pattern"


@pytest.mark.row(26)
@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a)\1", r"(?<=a)b", r"(?<!a)b", r"(?>a*)b", r"(a)?(?(1)b|c)", r"a*+b"),
        *("(?i)a", "(?i:a)", "(?x) a", "a" * 2001),
    ],
)
def test_what_needs_backtracking_or_flags_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedCheckpoint) as caught:
        compiled(pattern)
    assert caught.value.field == "rank_pattern"


@pytest.mark.row(26)
@pytest.mark.parametrize(
    "pattern", ["(", "*", "[z-a]", "(?P<x", "a{99999999999999999999}", "(" * 900 + ")" * 900]
)
def test_what_does_not_compile_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        compiled(pattern)
    assert caught.value.field == "rank_pattern"
    assert isinstance(caught.value, InvalidCheckpoint | UnsupportedCheckpoint)
