"""``mpoc eval``: what it compares, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from mpoc import zoo
from mpoc.errors import UsageError
from mpoc.pipeline import compress_checkpoint
from mpoc.recipe import make_recipe
from mpoc.train.finetune import Request, finetune
from mpoc.train.material import DataOptions
from mpoc.train.measure import MeasureRequest, measure
from mpoc.train.settings import Settings
from tests.data.samples import pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """fc2.mpo and lenet5.mpo, which record their networks, and digits.npz without labels."""
    for name in ("fc2", "lenet5"):
        save_file(zoo.make(name).state_dict(), tmp_path / f"{name}.safetensors")
        recipe = make_recipe(None, {"bond": 4})
        compress_checkpoint(
            tmp_path / f"{name}.safetensors", tmp_path / f"{name}.mpo.safetensors", recipe, arch=name
        )
    np.savez(tmp_path / "digits.npz", x=pixels(40, 28, 28))
    np.savez(tmp_path / "arrays.npz", x=np.zeros((40, 3, 3), np.float32))
    return tmp_path


def asked(folder: Path, data: str = "digits.npz", **options: Any) -> MeasureRequest:
    return MeasureRequest(folder / "fc2.mpo.safetensors", DataOptions(folder / data), **options)


def test_a_reference_that_records_another_network(folder: Path) -> None:
    found = measure(asked(folder, reference=folder / "lenet5.mpo.safetensors"))
    assert found.scores.keys() == {"cosine", "relative_error", "kl", "agreement"}


def test_a_teacher_that_records_another_network(folder: Path) -> None:
    request = Request(
        folder / "fc2.mpo.safetensors", DataOptions(folder / "digits.npz"), Settings(steps=1),
        folder / "out.safetensors", teacher=folder / "lenet5.mpo.safetensors", device="cpu",
    )  # fmt: skip
    assert finetune(request).training["task"] == "distillation"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"data": "arrays.npz", "reference": "fc2.safetensors"},
            r"does not take x of shape \(40, 3, 3\) float",
        ),
        ({}, "digits.npz: has no labels$"),
        ({"task": "distillation"}, "--task distillation: of mpoc finetune"),
    ],
)
def test_what_is_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    if "reference" in options:
        options = options | {"reference": folder / options["reference"]}
    with pytest.raises(UsageError, match=said):
        measure(asked(folder, **options))
