"""What a network's record and the options make of a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpoc.data import Subset
from mpoc.errors import MpocError, UsageError
from mpoc.models import zoo
from mpoc.models.loading import Model, open_model
from mpoc.train import training_data
from mpoc.train.evaluate_file import evaluate_file
from mpoc.train.finetune import finetune
from mpoc.train.settings import DataOptions, EvaluationRequest, FinetuneRequest, Settings
from mpoc.train.training_data import open_training_data
from tests.data.samples import pixels, write_folder
from tests.support.marks import slow_except


@pytest.fixture
def fc2(tmp_path: Path) -> Model:
    save_file(zoo.make("fc2").state_dict(), tmp_path / "fc2.safetensors")
    return open_model(tmp_path / "fc2.safetensors", "fc2")


@pytest.fixture
def few_self_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "_SELF_MADE", 64)


def written(folder: Path, x: Any, y: Any = None) -> Path:
    np.savez(folder / "digits.npz", x=x, y=np.arange(len(x)) % 10 if y is None else y)
    return folder / "digits.npz"


def test_eval_uses_the_split_held_out_in_training(tmp_path: Path, fc2: Model) -> None:
    options = DataOptions(written(tmp_path, pixels(200, 28, 28)))
    held = []
    for seed in (0, 7):
        validation = open_training_data(options, fc2, seed).data.splits["validation"]
        assert isinstance(validation, Subset)
        held.append(validation.indices.tolist())
    assert held[0] == held[1]


def test_names_labels_out_of_range(tmp_path: Path, fc2: Model) -> None:
    y = np.arange(200) % 10
    y[123] = 37
    path = written(tmp_path, pixels(200, 28, 28), y)
    with pytest.raises(
        MpocError, match=r"digits.npz: label 37 .*train, example 123\) is out of range for a netw"
    ):
        evaluate_file(EvaluationRequest(fc2.path, DataOptions(path), arch="fc2"))


def test_rejects_images_of_another_size(tmp_path: Path, fc2: Model) -> None:
    path = written(tmp_path, pixels(20, 32, 32))
    with pytest.raises(MpocError, match="examples are 1×32×32, but the network takes 1×28×28") as caught:
        open_training_data(DataOptions(path), fc2, 0)
    assert caught.value.hint == "resize: --image-size 28x28"
    open_training_data(DataOptions(path, size=(28, 28)), fc2, 0)


def test_makes_examples_where_none_are_given(fc2: Model, few_self_made: None) -> None:
    """Images of the network's shape, the same every time, a share of them held out."""
    data = [open_training_data(DataOptions(), fc2, seed).data for seed in (0, 7)]
    train, validation = (data[0].splits[name] for name in ("train", "validation"))
    batch = train.batch([0, 1])
    assert set(batch) == {"x"} and batch["x"].shape == (2, 1, 28, 28) and batch["x"].dtype == torch.uint8
    assert len(train) > 5 * len(validation) > 0
    assert torch.equal(batch["x"], data[1].splits["train"].batch([0, 1])["x"])


@pytest.mark.parametrize(
    "spec", slow_except(["fc2", "picogpt:vocab=11,context=8"], "picogpt:vocab=11,context=8")
)
def test_distils_without_data(tmp_path: Path, spec: str, few_self_made: None) -> None:
    """A network learns what its teacher answers on examples that are made for it."""
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        save_file(zoo.make(spec).state_dict(), tmp_path / f"{name}.safetensors")
    student, teacher = tmp_path / "student.safetensors", tmp_path / "teacher.safetensors"
    out, settings = tmp_path / "out.safetensors", Settings(steps=8, batch=16, lr=0.001)
    request = FinetuneRequest(student, DataOptions(), settings, out, arch=spec, teacher=teacher, device="cpu")
    training = finetune(request).training
    assert training["final"]["loss"] < training["start"]["loss"]
    assert training["data"]["name"] == "self-made"
    again = evaluate_file(EvaluationRequest(out, DataOptions(), arch=spec, reference=teacher, device="cpu"))
    assert again.split == "validation" and again.scores["agreement"] == training["final"]["agreement"]


def test_asks_for_data_or_a_teacher(tmp_path: Path, fc2: Model) -> None:
    with pytest.raises(UsageError, match="nothing to learn from"):
        finetune(FinetuneRequest(fc2.path, DataOptions(), arch="fc2"))
    with pytest.raises(UsageError, match="nothing to measure with"):
        evaluate_file(EvaluationRequest(fc2.path, DataOptions(), arch="fc2"))
    with pytest.raises(UsageError, match="--block requires --data"):
        open_training_data(DataOptions(block=8), fc2, None)


@pytest.mark.parametrize(
    "given", [{"mean": (0.5,)}, {"flip": False}, {"size": (28, 28)}, {"block": 8}, {"column": "text"}]
)
def test_rejects_options_for_another_kind_of_data(tmp_path: Path, fc2: Model, given: dict[str, Any]) -> None:
    path = written(tmp_path, np.zeros((20, 784), np.float32))
    said = r"--(mean|flip|image-size|block|column) applies to (images|text), but .*digits.npz holds arrays"
    with pytest.raises(UsageError, match=said):
        open_training_data(DataOptions(path, **given), fc2, 0)


def animals(folder: Path, *names: str) -> Path:
    """An image folder with the same ten images for each name."""
    return write_folder(folder, {name: list(pixels(10, 28, 28)) for name in names})


def tuned_on(data: Path, source: Path) -> Path:
    request = FinetuneRequest(
        source, DataOptions(data), Settings(steps=1, batch=4), source.with_name("tuned.safetensors"),
        arch="fc2", device="cpu", force=True,
    )  # fmt: skip
    return finetune(request).output


@pytest.mark.slow
def test_keeps_the_class_numbers_of_training(tmp_path: Path, fc2: Model) -> None:
    tuned = tuned_on(animals(tmp_path / "a", "cat", "cow", "dog"), fc2.path)
    part = animals(tmp_path / "b", "dog", "cow")
    training_data = open_training_data(DataOptions(part), open_model(tuned, "fc2"), None)
    y = training_data.loader("train").read(torch.tensor([0, 10]))["y"]
    assert y.tolist() == [1, 2]
    assert "classes are numbered as in training" in training_data.data.notes
    # trained again on a part of them, it still knows all
    again = tuned_on(part, tuned.rename(tmp_path / "once.safetensors"))
    assert open_training_data(DataOptions(part), open_model(again, "fc2"), 0).classes == {
        "cat": 0,
        "cow": 1,
        "dog": 2,
    }


@pytest.mark.slow
def test_rejects_classes_absent_from_training(tmp_path: Path, fc2: Model) -> None:
    tuned = tuned_on(animals(tmp_path / "a", "cat", "dog"), fc2.path)
    other = DataOptions(animals(tmp_path / "b", "cat", "zebra"))
    asked = EvaluationRequest(tuned, other, arch="fc2", device="cpu")
    with pytest.raises(MpocError, match="b: class 'zebra' is none of the 2 of") as caught:
        evaluate_file(asked)
    assert caught.value.hint == "name the classes as in training: cat, dog"
    assert evaluate_file(replace(asked, reference=fc2.path)).examples > 0
    training_data = open_training_data(other, open_model(tuned, "fc2"), 0)
    assert training_data.classes == {"cat": 0, "zebra": 1}
    assert any("without 'zebra': classes are renumbered" in note for note in training_data.data.notes)


@pytest.mark.parametrize(
    "record", [{"mean": 3}, {"mean": ["x"]}, {"pad": "4"}, {"size": [2.5, 3]}, {"colour": 1}, {"mean": None}]
)
def test_rejects_damaged_image_records(tmp_path: Path, fc2: Model, record: dict[str, Any]) -> None:
    path = written(tmp_path, pixels(20, 28, 28))
    strange = replace(fc2, stored=replace(fc2.stored, history={"images": record}))
    with pytest.raises(MpocError, match=r"fc2\.safetensors: damaged record of the preprocessing of images"):
        open_training_data(DataOptions(path), strange, 0)
