"""Whether this interpreter's environment can run the project: `python satisfied.py EXTRA...`.

Exit status 0 if so; else 1, with what is missing. An environment that this project was installed
into has to match constraints.txt exactly. Any other one, given by its owner, has to meet the ranges
of pyproject.toml.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main(extras: list[str]) -> int:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        print("packaging is not installed")
        return 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    is_ours = installed("sloraj") is not None
    pins = exact_pins() if is_ours else {}
    problems = []
    for requirement in map(Requirement, wanted):
        problems += check(requirement, pins)
        for needed in of_extras(requirement):
            problems += check(needed, pins)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(requirement, pins: dict[str, str]) -> list[str]:
    """What is wrong with one requirement: nothing, or one line."""
    version = installed(requirement.name)
    pin = pins.get(requirement.name.lower().replace("_", "-"))
    if version is None:
        return [f"{requirement.name} is not installed"]
    if pin is not None and version != pin:
        return [f"{requirement.name}: installed {version}, pinned {pin}"]
    if not requirement.specifier.contains(version, prereleases=True):
        return [f"{requirement.name}: installed {version}, allowed {requirement.specifier}"]
    return []


def of_extras(requirement) -> list:
    """What a requirement's own extras ask for, e.g. jax[cuda13] for the plugin.

    No deeper than that, because CUDA's libraries may come from the system.
    """
    from packaging.requirements import Requirement

    if not requirement.extras or installed(requirement.name) is None:
        return []
    needed = map(Requirement, importlib.metadata.requires(requirement.name) or [])
    return [
        n
        for n in needed
        if n.marker is not None
        and not n.marker.evaluate({"extra": ""})
        and any(n.marker.evaluate({"extra": extra}) for extra in requirement.extras)
    ]


def exact_pins() -> dict[str, str]:
    """Package -> version, as constraints.txt has it for this Python."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        pin.name: next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
