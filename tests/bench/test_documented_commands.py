"""The commands in the docstrings of the serving benchmarks are ones that they take."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

MODULES = ("bench.workloads", "bench.serving", "bench.slo")


def documented(module: str) -> list[list[str]]:
    text = (importlib.import_module(module).__doc__ or "").replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^ {4}python -m (bench\..+)$", text, re.M)]


@pytest.mark.parametrize("module", MODULES)
def test_every_documented_command_parses(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = documented(module)
    assert commands
    for words in commands:
        assert words[0] in MODULES
        monkeypatch.setattr("sys.argv", words)
        importlib.import_module(words[0])._parse()


@pytest.mark.parametrize("module", MODULES)
def test_help_is_printed(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module)._parse()
    assert stopped.value.code == 0
    assert "options:" in capsys.readouterr().out
