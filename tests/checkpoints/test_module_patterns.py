"""Patterns from strangers match as `re` does, or are refused before they can run for years."""

from __future__ import annotations

import re
import time

import pytest

from checkpoints.errors import InvalidCheckpoint, UnsupportedCheckpoint
from checkpoints.hf_weights import module_path
from checkpoints.model_config import TARGET_MODULES
from checkpoints.module_patterns import compile_pattern

PATHS = [module_path(layer, module) for layer in range(40) for module in TARGET_MODULES]

# Patterns that trainers write; the last but one is the shape of Unsloth's default.
USUAL = [
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r".*\.layers\.(0|1|2|[3-9]|1\d)\..*_proj",
    r"^model\.layers\.([0-9]|1[0-9])\.mlp\.(gate|up|down)_proj$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|up_proj)))",
    r"(?!.*lm_head).*_proj",
]
COSTLY = [
    r"(.*)*x",
    r"(a+)+$",
    r"(?:(?:.+)+)+!",
    r"(.|m)*x",
    r"(?:mo|m|o)+z",
    r".*.*.*.*.*x",
    r"(?:.*a){30}",
    r"(.{1,50}){1,50}x",
    r"(?=(.*)*x)y",
    r"(m.*)\1",
    r"(?>.*){9}.*",
    r".{65}" * 40,
    "a" * 2001,
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_compiled_unchanged(pattern: str) -> None:
    compiled = compile_pattern(pattern, field="target_modules", where="f")
    expected = [path for path in PATHS if re.fullmatch(pattern, path)]
    assert [path for path in PATHS if compiled.fullmatch(path)] == expected
    assert expected


@pytest.mark.row(26)
@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", COSTLY)
def test_costly_patterns_are_refused_at_once(pattern: str) -> None:
    with pytest.raises(UnsupportedCheckpoint) as caught:
        compile_pattern(pattern, field="target_modules", where="f")
    assert caught.value.field == "target_modules"


@pytest.mark.row(26)
@pytest.mark.parametrize(
    "pattern", ["(", "*", "[z-a]", "(?P<x", "a{99999999999999999999}", "(" * 1500 + ")" * 1500]
)
def test_patterns_that_do_not_compile_are_refused(pattern: str) -> None:
    with pytest.raises((InvalidCheckpoint, UnsupportedCheckpoint)) as caught:
        compile_pattern(pattern, field="rank_pattern", where="f")
    assert caught.value.field == "rank_pattern"


@pytest.mark.timeout(60)
def test_the_costliest_patterns_allowed_take_bounded_time() -> None:
    for pattern in (r".*.*.*.*x", r".*?.*?.*?.*?x", r"[a-z.]+\w+.+.*\d"):
        compiled = compile_pattern(pattern, field="f", where="f", template=r"(.*\.)?(%s)$")
        started = time.process_time()
        assert not any(compiled.match(path) for path in PATHS)
        assert time.process_time() - started < 10
