"""What ``mpoc eval`` measures of a set that has one split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpoc.data import Subset
from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.models.loading import open_model
from mpoc.train.evaluate_file import FileEvaluation, evaluate_file
from mpoc.train.finetune import finetune
from mpoc.train.settings import DataOptions, EvaluationRequest, FinetuneRequest, Settings
from mpoc.train.training_data import open_training_data
from tests.data.samples import pixels

GPT = "picogpt:vocab=3,context=8"


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    """lone.npz, 200 images in one split, and fc2.safetensors."""
    save_file(zoo.make("fc2").state_dict(), tmp_path / "fc2.safetensors")
    np.savez(tmp_path / "lone.npz", x=pixels(200, 28, 28), y=np.arange(200) % 10)
    return tmp_path / "lone.npz"


def tuned(data: Path, **options: Any) -> Path:
    source = data.with_name("fc2.safetensors")
    settings = Settings(steps=1, seed=7)
    output = data.with_name("tuned.safetensors")
    return finetune(
        FinetuneRequest(source, DataOptions(data, **options), settings, output, arch="fc2", device="cpu")
    ).output


def measured(source: Path, data: Path, **options: Any) -> tuple[FileEvaluation, list[str]]:
    said: list[str] = []
    request = EvaluationRequest(source, DataOptions(data, **options), arch="fc2", device="cpu")
    return evaluate_file(request, said.append), said


def test_evaluates_all_of_an_unused_data_set(lone: Path) -> None:
    found, said = measured(lone.with_name("fc2.safetensors"), lone)
    assert (found.split, found.examples) == ("train", 200)
    assert "all examples are measured: no training on this data set is recorded" in said
    np.savez(lone.with_name("other.npz"), x=pixels(50, 28, 28, seed=1), y=np.arange(50) % 10)
    found, said = measured(tuned(lone), lone.with_name("other.npz"))
    assert found.examples == 50


@pytest.mark.parametrize(("options", "count"), [({}, 20), ({"held_out": 0.25}, 50)])
def test_evaluates_what_training_held_out(lone: Path, options: dict[str, Any], count: int) -> None:
    source = tuned(lone, **options)
    moved = lone.rename(lone.with_name("moved.npz"))
    found, said = measured(source, moved)
    assert (found.split, found.examples) == ("validation", count)
    share = options.get("held_out", 0.1)
    assert f"{share:.3g} of train is held out, as in the network's training on this set" in said
    splits = [
        open_training_data(DataOptions(moved, **options), open_model(source, "fc2"), seed).data.splits
        for seed in (7, None)
    ]
    for name in ("train", "validation"):
        learnt, seen = (split[name] for split in splits)
        assert isinstance(learnt, Subset)
        assert isinstance(seen, Subset)
        assert torch.equal(learnt.indices, seen.indices)


def test_notes_an_evaluation_on_training_data(lone: Path) -> None:
    found, said = measured(tuned(lone, held_out=0.0), lone)
    assert found.examples == 200
    assert "all examples are measured, and the network was trained on all of them" in said


def test_evaluates_a_requested_share(lone: Path) -> None:
    source = lone.with_name("fc2.safetensors")
    assert measured(source, lone, held_out=0.5)[0].examples == 100
    with pytest.raises(UsageError, match=r"--hold-out -0\.5: must be at least 0 and below 1"):
        measured(source, lone, held_out=-0.5)


def test_evaluates_text_whole_and_in_order(tmp_path: Path) -> None:
    save_file(zoo.make(GPT).state_dict(), tmp_path / "gpt.safetensors")
    (tmp_path / "a.txt").write_text("abcab" * 32)
    model = open_model(tmp_path / "gpt.safetensors", GPT)
    train = open_training_data(DataOptions(tmp_path / "a.txt"), model, None).data.splits["train"]
    read = train.batch(range(len(train)))["input_ids"].flatten().tolist()
    assert read == [0, 1, 2, 0, 1] * 32
