"""What a network's record and the options make of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from mpoc import zoo
from mpoc.data import Subset
from mpoc.errors import MpocError, UsageError
from mpoc.train.material import DataOptions, open_material
from mpoc.train.measure import MeasureRequest, measure
from mpoc.train.model import Model, open_model
from tests.data.samples import pixels


@pytest.fixture
def fc2(tmp_path: Path) -> Model:
    save_file(zoo.make("fc2").state_dict(), tmp_path / "fc2.safetensors")
    return open_model(tmp_path / "fc2.safetensors", "fc2")


def written(folder: Path, x: Any, y: Any = None) -> Path:
    np.savez(folder / "digits.npz", x=x, y=np.arange(len(x)) % 10 if y is None else y)
    return folder / "digits.npz"


def test_what_is_held_out_in_training_is_held_out_in_eval_whatever_the_seed(
    tmp_path: Path, fc2: Model
) -> None:
    options = DataOptions(written(tmp_path, pixels(200, 28, 28)))
    held = []
    for seed in (0, 7):
        validation = open_material(options, fc2, seed).data.splits["validation"]
        assert isinstance(validation, Subset)
        held.append(validation.indices.tolist())
    assert held[0] == held[1]


def test_a_label_out_of_range_is_named(tmp_path: Path, fc2: Model) -> None:
    y = np.arange(200) % 10
    y[123] = 37
    path = written(tmp_path, pixels(200, 28, 28), y)
    with pytest.raises(
        MpocError, match=r"digits.npz: label 37 .*train, example 123\) is out of range for a netw"
    ):
        measure(MeasureRequest(fc2.path, DataOptions(path), arch="fc2"))


def test_images_of_another_size(tmp_path: Path, fc2: Model) -> None:
    path = written(tmp_path, pixels(20, 32, 32))
    with pytest.raises(MpocError, match="examples are 1×32×32, but the network takes 1×28×28") as caught:
        open_material(DataOptions(path), fc2, 0)
    assert caught.value.hint == "resize: --size 28x28"
    open_material(DataOptions(path, size=(28, 28)), fc2, 0)


@pytest.mark.parametrize(
    "given", [{"mean": (0.5,)}, {"flip": False}, {"size": (28, 28)}, {"block": 8}, {"column": "text"}]
)
def test_options_for_another_kind_of_data(tmp_path: Path, fc2: Model, given: dict[str, Any]) -> None:
    path = written(tmp_path, np.zeros((20, 784), np.float32))
    with pytest.raises(UsageError, match=r"--\w+ is for (images|text), and .*digits.npz holds arrays"):
        open_material(DataOptions(path, **given), fc2, 0)
