"""What the documents name exists: targets, commands, flags, settings and their defaults, endpoints,
code, and links.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from serving import cli
from serving.app import ROUTES
from serving.config import ServerConfig
from sloraj.config import EngineConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()
PACKAGES = ("serving", "sloraj", "checkpoints", "pallas_kernels", "bench")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found
    return found


def commands(program: str) -> list[list[str]]:
    """Arguments of every call of a program in the README, in shell blocks and in the text."""
    shell = "\n".join(blocks("sh")).replace("\\\n", " ")
    inline = "\n".join(re.findall(r"`([^`\n]+)`", README))
    lines = re.findall(rf"^{re.escape(program)} (.+)$", f"{shell}\n{inline}", re.MULTILINE)
    assert lines
    return [shlex.split(line, comments=True) for line in lines]


def all_flags() -> set[str]:
    """Every option string of the command line, of all its commands."""
    (subparsers,) = (
        action
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    parsers = subparsers.choices.values()
    return {flag for parser in parsers for flag in parser._option_string_actions}


def test_every_make_target_and_variable_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    for words in commands("make"):
        assert words[0] in targets
        assert {word.partition("=")[0] for word in words[1:]} <= variables


def test_every_command_of_the_command_line_parses() -> None:
    given = [words for words in commands("sloraj") if len(words) > 1]  # not a bare mention
    assert {words[0] for words in given} == {"serve", "generate", "check", "convert"}
    for words in given:
        if words[1].isupper():
            continue  # a form, not a call
        cli._parser().parse_args(words)  # SystemExit if it does not


def test_every_benchmark_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [words for words in commands("python -m") if words[0].startswith("bench.")]
    assert given
    for words in given:
        monkeypatch.setattr(sys, "argv", words)
        importlib.import_module(words[0])._parse()


def test_every_flag_mentioned_exists() -> None:
    for text in (README, DESIGN):
        text = re.sub(r"`?(python -m|make) bench[^`\n]*", "", text)  # parsed by the tests above
        text = re.sub(r"`ARGS=[^`]*`", "", text)  # and below
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= all_flags()


def test_makes_own_flags_are_those_of_serve() -> None:
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / "Makefile").read_text()))
    assert used - {"--check", "--fix", "--no-cache", "--quick"} <= all_flags()


def test_every_call_of_make_bench_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = (README, (ROOT / "docs" / "evaluation.md").read_text())
    given = [words for text in texts for words in re.findall(r'ARGS="?(--quick|[^"`]*-7b)', text)]
    assert len(given) >= 2
    for words in given:
        monkeypatch.setattr(sys, "argv", ["bench", *words.split()])
        importlib.import_module("bench.__main__")._parse()


def same_default(written: str, field: dataclasses.Field[Any]) -> bool:
    """Whether a default in a table is the field's; words stand for None and the like."""
    if isinstance(field.default, bool):
        return written == ("on" if field.default else "off")
    if field.default in (None, (), dataclasses.MISSING):
        return not written.replace(".", "").isdigit()
    return written == str(field.default)


@pytest.mark.parametrize(
    ("config", "name_form"),
    [(EngineConfig, r"(\w+)"), (ServerConfig, r"--([\w-]+)")],
    ids=["engine", "server"],
)
def test_tables_give_every_setting_its_real_default(config: type[Any], name_form: str) -> None:
    rows = re.findall(rf"^\| `{name_form}` \| (.*?) ?\|", README, re.MULTILINE)
    assert len(rows) > 10
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name, written in rows:
        assert same_default(written, fields[name.replace("-", "_")]), (name, written)


def test_every_endpoint_listed_exists() -> None:
    known = {(method, path.replace(":path", "")) for method, path, _ in ROUTES}
    listed = re.findall(r"`(GET|POST) (/[\w/{}]*)`", README)
    assert len(listed) > 10 and set(listed) <= known
    used = re.findall(r"http://127\.0\.0\.1:8000(/v1/\w+(?:/\w+)?)", README)
    assert used and set(used) <= {path for _, path in known}


@pytest.mark.parametrize("block", blocks("python"))
def test_python_examples_import_what_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_file_and_name_in_the_design_exists() -> None:
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    mentions = re.findall(r"`((?:\w+/)*\w+\.py)(?:: ([\w.]+))?`", DESIGN)
    assert len(mentions) > 30
    for file, name in mentions:
        found = [text for path, text in sources.items() if f"/{path}".endswith(f"/{file}")]
        assert found or (ROOT / file).is_file(), file
        for part in filter(None, name.split(".")):
            assert any(re.search(rf"(def|class) {part}\b", text) for text in found), (file, name)


@pytest.mark.parametrize(
    "file", ["README.md", "CHANGELOG.md", "docs/design.md", "docs/bad_input.md"]
)
def test_links_between_documents_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or ((ROOT / file).parent / link).exists(), link
