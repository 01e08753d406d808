from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpoc.runtime.packages import Package, packages

PROJECT: dict[str, Any] = tomllib.loads(
    (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8")
)["project"]


@pytest.fixture(autouse=True)
def _as_in_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata as an installer writes them of what pyproject asks for."""
    lines = list(PROJECT["dependencies"])
    for extra, more in PROJECT["optional-dependencies"].items():
        lines += [f"{line}; extra == '{extra}'" for line in more]
    about = SimpleNamespace(json={"requires_python": PROJECT["requires-python"]})
    monkeypatch.setattr(metadata, "metadata", lambda name: about)
    monkeypatch.setattr(metadata, "requires", lambda name: lines)


def test_lists_all_requirements() -> None:
    found = {package.name: package for package in packages()}
    assert found["Python"].needs == ">=3.11"
    assert (found["torch"].needs, found["torch"].extra) == (">=2.6,<2.14", None)
    assert (found["transformers"].needs, found["transformers"].extra) == (">=5.23", "hf")
    needed = {package.name for package in found.values() if package.extra is None}
    assert needed == {"Python", *(line.partition(">")[0] for line in PROJECT["dependencies"])}
    assert {package.extra for package in found.values()} == {None, "hf", "train", "plot", "onnx"}
    assert "pytest" not in found


def test_reports_installed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {p.name: p.version for p in packages()}["torch"] == metadata.version("torch")

    def none(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", none)
    assert {package.version for package in packages() if package.name != "Python"} == {None}


@pytest.mark.parametrize(
    ("version", "right"), [("2.5.9", False), ("2.6.0", True), ("2.13.1+cu130", True), ("2.14.0", False)]
)
def test_checks_bounds_and_suggests_fixes(version: str, right: bool) -> None:
    package = Package("torch", version, ">=2.6,<2.14")
    assert package.is_right == right
    assert package.remedy == "pip install 'torch>=2.6,<2.14'"
    assert Package("pyarrow", version, ">=15", "train").remedy == "pip install 'mpoc[train]'"
    assert not Package("torch", None, ">=2.6").is_right
