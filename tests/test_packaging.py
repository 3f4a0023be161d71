"""The package's own papers agree with each other, and an environment is judged rightly."""

from __future__ import annotations

import importlib.util
import itertools
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import sloraj
from sloraj.config import EngineConfig

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


@pytest.fixture
def satisfied() -> ModuleType:
    spec = importlib.util.spec_from_file_location("satisfied", ROOT / ".ci" / "satisfied.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_changelogs_top_version_is_the_packages() -> None:
    found = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == sloraj.__version__


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_requirement_is_pinned_once_within_its_range(python: str) -> None:
    pins: dict[str, str] = {}
    for pin in PINS:
        assert pin.url is None
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in pins
            (only,) = pin.specifier
            assert only.operator == "=="
            pins[pin.name] = only.version
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *itertools.chain.from_iterable(extras)]
    for requirement in map(Requirement, wanted):
        pin_version = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pin_version), requirement.name


def test_nothing_installed_by_default_needs_torch() -> None:
    assert not {"torch", "triton", "tensorflow"} & {pin.name for pin in PINS}


def test_the_readme_lists_every_engine_setting() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed == [*EngineConfig.__dataclass_fields__]


def test_this_environment_satisfies_the_project(satisfied: ModuleType) -> None:
    assert satisfied.main(["test"]) == 0


def test_what_is_wrong_with_an_environment_is_named(
    satisfied: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"numpy": "1.0", "jax": "0.10.2"}
    monkeypatch.setattr(satisfied, "installed", versions.get)
    assert satisfied.check(Requirement("torch>=2"), {}) == ["torch is not installed"]
    assert satisfied.check(Requirement("numpy>=2"), {}) == ["numpy: installed 1.0, allowed >=2"]
    assert satisfied.check(Requirement("jax>=0.10"), {"jax": "0.10.3"}) == [
        "jax: installed 0.10.2, pinned 0.10.3"
    ]
    assert satisfied.check(Requirement("jax>=0.10"), {"jax": "0.10.2"}) == []


def test_the_cuda_extra_asks_for_the_plugin(satisfied: ModuleType) -> None:
    names = {needed.name for needed in satisfied.of_extras(Requirement("jax[cuda13]"))}
    assert "jax-cuda13-plugin" in {name.replace("_", "-") for name in names}
    assert "jax-cuda12-plugin" not in {name.replace("_", "-") for name in names}
