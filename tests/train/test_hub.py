"""Directories of transformers: fine-tuned to directories that load again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpoc.io.manifest_reader import read_manifest
from mpoc.train.finetune import finetune
from mpoc.train.settings import DataOptions, FinetuneRequest, Settings
from tests.support.hub_models import answer, auto, compress, tiny

WORDS = [*"abcdefghijklmn"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_distils_towards_the_original(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense = tiny(kind)
    done = compress(dense, tmp_path, bond=2)
    lines = [{"text": " ".join(WORDS[k % 7 : k % 7 + 5])} for k in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    request = FinetuneRequest(
        done.path,
        DataOptions(tmp_path / "corpus.jsonl", block=16),
        Settings(epochs=8, lr=0.003, batch=12),
        teacher=tmp_path / "original",
        device="cpu",
    )
    said: list[str] = []
    tuned = finetune(request, said.append)
    assert tuned.output == Path("compressed-tuned")
    assert tuned.training["final"]["loss"] < 0.9 * tuned.training["start"]["loss"]
    manifest = read_manifest(tuned.output)
    assert manifest.training["task"] == "distillation"
    card = (tuned.output / "README.md").read_text()
    assert card.count("## Compressed with mpoc") == 1
    far = [_distance(auto(kind, folder), dense) for folder in (done.path, tuned.output)]
    assert far[1] != far[0]
    assert (tuned.output / "config.json").read_bytes() == (done.path / "config.json").read_bytes()


def _distance(model: Any, dense: Any) -> float:
    return float(torch.linalg.vector_norm(answer(model) - answer(dense)))
