from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mpoc.cli import doctor
from mpoc.cli.doctor import Examination, Fault, examine, lines
from mpoc.errors import MpocError
from mpoc.runtime.device import DeviceInfo
from mpoc.runtime.packages import Package


@pytest.fixture(autouse=True)
def _well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a fault, whose self-tests take no time."""
    monkeypatch.setattr(doctor, "packages", lambda: [Package("torch", "2.13.0", ">=2.6,<2.14")])
    monkeypatch.setattr(doctor, "devices", lambda: ([], ["none here"]))
    monkeypatch.setattr(doctor, "free_disk", lambda: {"/tmp": 10**11})
    monkeypatch.setattr("mpoc.cli.doctor.self_test", lambda device, folder: 1e-7)


def faults(found: Examination) -> list[tuple[str, bool]]:
    return [(fault.what, fault.stops) for fault in found.faults]


def test_healthy_machine_has_no_faults() -> None:
    found = examine()
    assert (found.faults, found.is_well) == ([], True)
    assert [(trial.device, trial.difference) for trial in found.trials] == [("cpu", 1e-7)]
    value = json.loads(json.dumps(found.as_dict()))
    assert (value["schema"], value["well"]) == ("mpoc.doctor/1", True)
    assert value["packages"][0] == {
        "name": "torch", "version": "2.13.0", "needs": ">=2.6,<2.14", "extra": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("package", "what", "stops"),
    [
        (Package("torch", "2.14.0", ">=2.6,<2.14"), "torch 2.14.0 is outside >=2.6,<2.14", True),
        (Package("numpy", None, ">=2.0"), "numpy is not installed", True),
        (
            Package("transformers", "4.40.0", ">=5.23", "hf"),
            "transformers 4.40.0 is outside >=5.23, which the extra hf asks for",
            False,
        ),
    ],
)
def test_reports_packages_outside_their_bounds(
    monkeypatch: pytest.MonkeyPatch, package: Package, what: str, stops: bool
) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: [package])
    found = examine()
    assert found.faults == [Fault(what, package.remedy, stops)]
    assert found.is_well == (not stops)


def test_missing_extra_is_not_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: [Package("matplotlib", None, ">=3.8", "plot")])
    assert examine().faults == []


def test_reports_an_uninstalled_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages", raising(metadata.PackageNotFoundError("mpoc")))
    assert faults(examine()) == [
        ("mpoc runs from a folder and is not installed, so its requirements are not known", False)
    ]


def test_reports_low_disk_space_and_missing_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_disk", lambda: {"/tmp": 12_000_000})
    assert faults(examine()) == [("12 MB free in /tmp", False)]
    monkeypatch.setattr(doctor, "free_disk", raising(FileNotFoundError("no usable temporary directory")))
    (fault,) = examine().faults
    assert "TMPDIR=" in fault.remedy


def test_reports_a_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", raising(OSError("libcudart.so: cannot open")))
    found = examine()
    assert faults(found) == [("torch cannot be imported: libcudart.so: cannot open", True)]
    assert found.faults[0].remedy == "pip install --force-reinstall 'torch>=2.6,<2.14'"
    assert (found.is_well, found.trials) == (False, [])
    assert "GPUs" not in dict(lines(found))


def test_reports_a_missing_torch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: [Package("torch", None, ">=2.6,<2.14")])
    monkeypatch.setattr(doctor, "devices", raising(ModuleNotFoundError("No module named 'torch'")))
    found = examine()
    assert found.faults == [Fault("torch is not installed", "pip install 'torch>=2.6,<2.14'")]


def test_prints_one_line_per_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    train = [Package("accelerate", "1.2", ">=1.0", "train"), Package("pillow", None, ">=10", "train")]
    plot = [Package("matplotlib", None, ">=3.8", "plot")]
    monkeypatch.setattr(doctor, "packages", lambda: [*train, *plot])
    told = dict(lines(examine()))
    assert told["mpoc[train]"] == "accelerate 1.2; without pillow: pip install 'mpoc[train]'"
    assert told["mpoc[plot]"] == "without matplotlib: pip install 'mpoc[plot]'"


def test_tests_every_usable_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [DeviceInfo("cuda:0", "a card", 10**9, True), DeviceInfo("mps", "Apple GPU", None, False)]
    monkeypatch.setattr(doctor, "devices", lambda: (cards, []))
    tried: list[str] = []

    def one_fails(device: str, folder: Path) -> float:
        assert list(folder.iterdir()) == []
        tried.append(device)
        if device != "cpu":
            raise RuntimeError("no kernel image is available\nCompile with …")
        return 1e-7

    monkeypatch.setattr("mpoc.cli.doctor.self_test", one_fails)
    found = examine()
    assert tried == ["cpu", "cuda:0"]
    assert [trial.difference for trial in found.trials] == [1e-7, None]
    assert faults(found) == [("self-test on cuda:0: RuntimeError: no kernel image is available", True)]
    assert "--device cpu" in found.faults[0].remedy


@pytest.mark.parametrize(
    ("error", "mend"),
    [(MpocError("outputs differ by 0.5"), "reinstall"), (OSError(28, "No space left on device"), "TMPDIR=")],
)
def test_suggests_a_fix_for_a_failed_self_test(
    monkeypatch: pytest.MonkeyPatch, error: Exception, mend: str
) -> None:
    monkeypatch.setattr("mpoc.cli.doctor.self_test", raising(error))
    found = examine()
    assert not found.is_well
    assert mend in found.faults[0].remedy
    assert str(error) in found.faults[0].what


def raising(error: BaseException) -> Any:
    def fail(*given: object) -> Any:
        raise error

    return fail
