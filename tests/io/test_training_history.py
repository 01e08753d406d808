"""What a dense checkpoint says of its training, and how it comes along through compression and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.training_history import HISTORY_FILE, before_compression, read_history, recorded
from mpoc.models import zoo
from mpoc.models.loading import open_model
from mpoc.reporting.remarks import training_lines
from mpoc.train.evaluate_file import evaluate_file
from mpoc.train.finetune import finetune
from mpoc.train.settings import DataOptions, EvaluationRequest, FinetuneRequest, Settings
from mpoc.train.training_data import open_training_data
from tests.support.hub_models import tiny

GPT = "picogpt:vocab=12,context=16"
LETTERS = "abcdefghijkl"


def gpt(folder: Path, text: str = LETTERS * 40) -> Path:
    """gpt.tuned.safetensors, dense, trained a little on a.txt."""
    save_file(zoo.make(GPT).state_dict(), folder / "gpt.safetensors")
    (folder / "a.txt").write_text(text)
    request = FinetuneRequest(
        folder / "gpt.safetensors", DataOptions(folder / "a.txt"), Settings(steps=2, batch=4),
        folder / "gpt.tuned.safetensors", arch=GPT, device="cpu",
    )  # fmt: skip
    return finetune(request).output


def ids(source: Path, data: Path, arch: str | None = GPT) -> torch.Tensor:
    """The first tokens that eval reads."""
    material = open_training_data(DataOptions(data), open_model(source, arch), None)
    return next(iter(material.data.splits.values())).batch([0])["input_ids"][0]


@pytest.mark.slow
def test_keeps_the_character_table(tmp_path: Path) -> None:
    tuned = gpt(tmp_path)
    assert "characters" in read_history(tuned)["tokenizer"]
    with pytest.raises(MpocError, match="not compressed by mpoc"):
        read_manifest(tuned)
    (tmp_path / "b.txt").write_text("lkjihg" * 40)
    assert ids(tuned, tmp_path / "b.txt").unique().tolist() == [6, 7, 8, 9, 10, 11]
    save_file(load_file(tuned), tmp_path / "plain.safetensors")
    with pytest.raises(MpocError, match=r"b\.txt: has 6 different characters, but the network 12"):
        evaluate_file(
            EvaluationRequest(tmp_path / "plain.safetensors", DataOptions(tmp_path / "b.txt"), arch=GPT)
        )


@pytest.mark.slow
def test_history_survives_compress_and_expand(tmp_path: Path) -> None:
    tuned = gpt(tmp_path)
    small, dense = tmp_path / "small.mpo.safetensors", tmp_path / "dense.safetensors"
    compress_checkpoint(tuned, small, make_recipe(None, {"bond": 2}), arch=GPT)
    expand_checkpoint(small, dense)
    (tmp_path / "b.txt").write_text("lkjihg" * 40)
    for source, arch in ((small, None), (dense, GPT)):
        assert ids(source, tmp_path / "b.txt", arch).unique().tolist() == [6, 7, 8, 9, 10, 11]
    training = read_manifest(small).training
    assert training == read_history(dense) == {"earlier": read_history(tuned)}
    said = training_lines(training)
    assert len(said) == 1
    assert said[0].startswith("before compression fine-tuned on a.txt: 2 steps of causal-lm, loss ")
    assert before_compression(training) == training
    assert recorded({"steps": 3, **training}, "task") == "causal-lm"


@pytest.mark.slow
def test_dense_directory_stores_its_history(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    tiny("bert").save_pretrained(folder)
    lines = [{"text": word * 3} for word in LETTERS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = DataOptions(tmp_path / "a.jsonl", block=8)
    source = folder
    for k in range(2):
        request = FinetuneRequest(
            source, data, Settings(steps=1, batch=4), tmp_path / f"tuned{k}", teacher=folder, device="cpu"
        )
        source = finetune(request).output
    history = read_history(source)
    assert history["task"] == "distillation"
    assert history["earlier"] == read_history(tmp_path / "tuned0")
    assert recorded(history, "tokenizer")["characters"] == LETTERS
    (source / HISTORY_FILE).write_text("[]")
    with pytest.raises(MpocError, match="tuned1: the history of its training is damaged"):
        open_model(source, None)
