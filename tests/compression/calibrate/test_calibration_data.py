"""Which examples are drawn, and how they are cut into batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpoc.compression.calibrate import calibration_data
from mpoc.compression.calibrate.calibration_data import (
    CalibrationData,
    CalibrationRequest,
    HeldExamples,
    calibrate_on,
    draw,
    glimpse,
    open_calibration,
)
from mpoc.compression.calibrate.output_of_interest import Pooling
from mpoc.data.open import data_fingerprint
from mpoc.errors import MpocError, UsageError
from mpoc.models import zoo
from mpoc.models.call import Batch
from mpoc.models.loading import Model, open_model
from mpoc.train.loader import BatchLoader
from mpoc.train.settings import DataOptions
from mpoc.train.training_data import open_training_data
from tests.compression.calibrate.test_output_of_interest import folder
from tests.data.samples import pixels
from tests.support.architectures import tiny


def lenet5(folder: Path) -> Model:
    save_file(zoo.make("lenet5").state_dict(), folder / "lenet5.safetensors")
    return open_model(folder / "lenet5.safetensors", "lenet5")


def opened(folder: Path, samples: int, **options: Any) -> CalibrationData:
    """Of 100 images whose first pixel is their number."""
    x = pixels(100, 28, 28)
    x.reshape(100, -1)[:, 0] = np.arange(100)
    np.savez(folder / "digits.npz", x=x, y=np.arange(100) % 10)
    return calibrate_on(lenet5(folder), CalibrationRequest(folder / "digits.npz", samples), **options)


def numbers(batches: list[Batch]) -> list[int]:
    mean, std = (zoo.ENTRIES["lenet5"].images[name][0] for name in ("mean", "std"))
    pixels = (float(x.flatten()[0]) * std + mean for batch in batches for x in batch["x"])
    return [round(255 * pixel) for pixel in pixels]


def test_splits_images(tmp_path: Path) -> None:
    found = opened(tmp_path, 80)
    parts = [numbers(part) for part in (found.batches, found.held_out, found.unseen)]
    assert [len(part) for part in parts] == [70, 10, 10]
    assert len(set().union(*parts)) == 90
    assert [len(batch["x"]) for batch in found.batches] == [64, 6]
    said = "90 of 100 examples of train (seed 0), 10 held out to choose with, 10 to report on"
    assert found.notes[-1] == f"calibration: {said}"
    assert found.pooling is None


def test_makes_examples_for_the_network(tmp_path: Path) -> None:
    """Pixels are preprocessed as those of a data set are."""
    found = calibrate_on(lenet5(tmp_path), CalibrationRequest("self", 16))
    assert (found.name, [len(batch["x"]) for batch in found.batches]) == ("self-made images", [14])
    said = "16 of 16 examples of self-made images (seed 0), 2 held out to choose with"
    assert found.notes[-1] == f"calibration: {said}" and not found.unseen
    x = found.batches[0]["x"]
    assert x.shape[1:] == (1, 28, 28) and 0 == float(x.min()) < float(x.max()) <= 1


def test_examples_held_out_are_of_other_domains(tmp_path: Path) -> None:
    loader = BatchLoader(HeldExamples({"x": torch.arange(80.0)[:, None]}))
    domains = torch.arange(80) // 10
    seen, held_out, unseen = (
        {int(k) // 10 for batch in part for k in batch["x"]}
        for part in draw(loader, 80, seed=0, domains=domains)
    )
    assert (len(seen), len(held_out)) == (7, 1) and not seen & held_out and held_out == unseen


def test_draw_is_seeded(tmp_path: Path) -> None:
    first, again, other = opened(tmp_path, 40), opened(tmp_path, 40), opened(tmp_path, 40, seed=1)
    assert numbers(first.batches) == numbers(again.batches) != numbers(other.batches)
    every = opened(tmp_path, 1000)  # all are drawn, so a third of those held out are reported on
    assert [len(numbers(part)) for part in (every.batches, every.held_out, every.unseen)] == [88, 8, 4]
    two = opened(tmp_path, 2)
    assert [len(numbers(part)) for part in (two.batches, two.held_out, two.unseen)] == [1, 1, 1]


def test_examples_held_out_in_training_are_not_drawn(tmp_path: Path) -> None:
    """``mpoc eval`` measures that part."""
    path = tmp_path / "lone.npz"
    np.savez(path, x=pixels(100, 28, 28), y=np.arange(100) % 10)
    model = lenet5(tmp_path)
    found = calibrate_on(model, CalibrationRequest(path, 1000))
    assert "100 of 100 examples of train" in found.notes[-1]
    record = {"data": {"fingerprint": data_fingerprint(path, "npz"), "held_out": 0.2}}
    model = replace(model, stored=replace(model.stored, history=record))
    found = calibrate_on(model, CalibrationRequest(path, 1000))
    assert "80 of 80 examples of train" in found.notes[-1]


def test_rejects_one_sample(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="held out"):
        opened(tmp_path, 1)


def test_rejects_a_single_example(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=pixels(1, 28, 28), y=np.zeros(1, int))
    with pytest.raises(MpocError, match="1 examples in train: calibration needs two"):
        calibrate_on(lenet5(tmp_path), CalibrationRequest(tmp_path / "one.npz", 8))


def test_batches_of_large_examples_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_data, "_NUMBERS", 3 * 28 * 28)
    np.savez(tmp_path / "ten.npz", x=pixels(10, 28, 28), y=np.zeros(10, int))
    found = calibrate_on(lenet5(tmp_path), CalibrationRequest(tmp_path / "ten.npz", 10))
    assert [len(batch["x"]) for batch in found.batches] == [3, 3, 3]
    assert [len(batch["x"]) for batch in found.held_out] == [1]


def test_batches_texts_of_equal_length(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "bert")
    folder(tmp_path / "bert", mean_tokens=True)
    alphabet = "".join(map(chr, range(33, 33 + 99)))  # as many as the network knows
    words = [(alphabet * 2)[8 * k % 99 :][: 2 + 3 * (k % 5)] for k in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    model = open_model(tmp_path / "bert", None)
    feed = open_training_data(DataOptions(tmp_path / "texts.jsonl", block=12), model, None).loader("train")
    batches, held_out, unseen = draw(feed, 40, seed=0, tokens=24)
    masks = [batch["attention_mask"] for batch in batches]
    apart = [sum(len(batch["input_ids"]) for batch in part) for part in (held_out, unseen)]
    assert sum(map(len, masks)) == 35 and apart == [4, 1]
    assert all(mask.numel() <= 24 for mask in masks)
    lengths = torch.cat([mask.sum(1) for mask in masks]).tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 2
    found = open_calibration(tmp_path / "bert", None, CalibrationRequest(tmp_path / "texts.jsonl"))
    assert found.pooling == Pooling("mean", normalize=False)


def test_a_pass_that_is_watched_sees_few_whole_texts() -> None:
    for width, count in ((512, 1), (4096, 1), (200, 2), (16, 4)):
        tokens = torch.arange(6 * width).view(6, width)
        texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "y": torch.arange(6)}
        seen = glimpse(texts)
        assert torch.equal(seen["input_ids"], tokens[:count]) and len(seen["y"]) == count
        assert seen["attention_mask"].shape == (count, width)
    assert glimpse({"x": torch.ones(6, 3, 8, 8)})["x"].shape == (4, 3, 8, 8)
