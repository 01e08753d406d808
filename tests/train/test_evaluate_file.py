"""``mpoc eval``: what it compares, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.models.call import Call
from mpoc.train.evaluate import try_call
from mpoc.train.evaluate_file import FileEvaluation, evaluate_file
from mpoc.train.finetune import finetune
from mpoc.train.settings import DataOptions, EvaluationRequest, FinetuneRequest, Settings
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


def asked(folder: Path, data: str = "digits.npz", **options: Any) -> EvaluationRequest:
    return EvaluationRequest(folder / "fc2.mpo.safetensors", DataOptions(folder / data), **options)


def test_reference_uses_its_recorded_network(folder: Path) -> None:
    found = evaluate_file(asked(folder, reference=folder / "lenet5.mpo.safetensors"))
    assert found.scores.keys() == {"cosine", "relative_error", "kl", "agreement"}


def test_original_is_the_reference_only_without_a_task(folder: Path) -> None:
    other = folder / "lenet5.mpo.safetensors"
    found = evaluate_file(asked(folder, stand_in=other))
    assert (found.metric, found.higher_is_better, found.reference) == ("agreement", True, other)
    assert found.scores == evaluate_file(asked(folder, reference=other)).scores
    np.savez(folder / "labelled.npz", x=pixels(40, 28, 28), y=np.arange(40) % 10)
    found = evaluate_file(asked(folder, "labelled.npz", stand_in=other))
    assert (found.metric, found.reference, found.data) == ("accuracy", None, "labelled.npz")


@pytest.mark.parametrize(
    ("metric", "higher", "before", "after", "drop"),
    [
        ("accuracy", True, 92.6, 91.6, 1.0),  # not 0.99999999999999
        ("loss", False, 0.5, 0.75, 0.25),
        ("loss", False, 0.5, 0.25, -0.25),
        ("accuracy", True, 50.0, 60.0, -10.0),
    ],
)
def test_drop_is_a_loss_of_the_metric(
    metric: str, higher: bool, before: float, after: float, drop: float
) -> None:
    first, second = (
        FileEvaluation(Path("m"), "d", "test", {metric: value}, 1, 1.0, "cpu", metric, higher)
        for value in (before, after)
    )
    assert second.drop_from(first) == drop


def test_teacher_uses_its_recorded_network(folder: Path) -> None:
    request = FinetuneRequest(
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
        ({}, "digits.npz: has no labels(?m:$)"),
        ({"task": "distillation"}, "--task distillation applies to mpoc finetune"),
    ],
)
def test_rejects_bad_requests(folder: Path, options: dict[str, Any], said: str) -> None:
    if "reference" in options:
        options = options | {"reference": folder / options["reference"]}
    with pytest.raises(UsageError, match=said):
        evaluate_file(asked(folder, **options))


class Lacking(nn.Module):
    """A network that wants more than its first input."""

    def forward(self, x: Tensor, pixels: Any = None) -> Tensor:
        """Fails."""
        return x @ pixels.weight


def test_whatever_a_network_raises_for_its_input_is_one_message() -> None:
    with pytest.raises(UsageError, match=r"does not take x of shape \(2, 3\) float32: 'NoneType'"):
        try_call(Call(None), Lacking(), {"x": torch.ones(2, 3)})
