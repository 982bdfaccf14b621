"""The dependencies: versions, hashes and lower bounds."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def pins(lines: list[str]) -> dict[tuple[str, str], str]:
    """The version of each package on each Python."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        for python in PYTHONS:
            environment = {"python_version": python, "python_full_version": f"{python}.1"}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                found[requirement.name, python] = str(requirement.specifier)
    return found


def lines(name: str) -> list[str]:
    """The lines of a file of requirements, joined where they end with a backslash."""
    text = (ROOT / name).read_text("utf-8").replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_every_pinned_version_has_the_hashes_of_its_files() -> None:
    """If it fails: CONTRIBUTING.md tells how hashes.txt is written anew after a change of constraints.txt."""
    hashed = [line.split(" --hash=sha256:") for line in lines("hashes.txt")]
    assert pins([requirement for requirement, *_ in hashed]) == pins(lines("constraints.txt"))
    for requirement, *hashes in hashed:
        assert hashes, requirement
        assert all(re.fullmatch("[0-9a-f]{64}", digest.strip()) for digest in hashes), requirement


def test_every_dependency_is_pinned() -> None:
    """On Python 3.10 some are free, as their newest versions have left it behind."""
    pinned = {name for name, python in pins(lines("constraints.txt")) if python != "3.10"}
    declared = re.findall(
        r'^    "([\w.-]+)[<>=]=', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE
    )
    assert len(declared) > 15
    assert {name.lower().replace("_", "-") for name in declared} <= pinned


@pytest.mark.parametrize(("name", "least"), [("torch", "2.10"), ("Pillow", "12.3"), ("safetensors", "0.4")])
def test_versions_with_known_holes_are_not_accepted(name: str, least: str) -> None:
    bound = re.search(rf'"{name}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert bound is not None
    assert Version(bound[1]) >= Version(least)
