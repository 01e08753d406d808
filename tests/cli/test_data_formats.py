"""Inputs without labels, as arrays or token ids: calibration, fidelity to a reference, distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from mpoc.cli.app import app
from mpoc.models import zoo
from tests.data.samples import pixels, write_jsonl, write_parquet
from tests.support.hub_models import tiny

IDS = np.random.default_rng(0).integers(3, 90, (24, 10))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mpoc(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def answer(*words: object) -> Any:
    result = mpoc(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def token_data(form: str) -> Path:
    mask = np.arange(10) < 10 - np.arange(24)[:, None] % 3
    if form == "npy":
        np.save("ids.npy", IDS)
    elif form == "npz":
        np.savez("ids.npz", input_ids=IDS, attention_mask=mask.astype(np.int64))
    elif form == "parquet":
        write_parquet(
            Path("ids.parquet"), {"input_ids": IDS.tolist(), "attention_mask": mask.astype(int).tolist()}
        )
    else:
        write_jsonl(
            Path("ids.jsonl"),
            [{"input_ids": row[kept].tolist()} for row, kept in zip(IDS, mask, strict=True)],
        )
    return Path(f"ids.{form}")


@pytest.mark.slow
def test_token_ids() -> None:
    tiny("bert").save_pretrained("bert")
    data = token_data("parquet")
    assert answer("compress", "bert", "-o", "small", "--bond", 2, "--calibrate", data, "--device", "cpu")
    tuned = answer("finetune", "small", "--data", data, "--teacher", "bert", "--steps", 2, "--device", "cpu")
    assert tuned["final"].keys() >= {"loss", "cosine"}
    against = ("--reference", "bert", "--hold-out", 0, "--device", "cpu")
    scores = {
        form: answer("eval", "small", "--data", token_data(form), *against)["scores"]
        for form in ("parquet", "jsonl", "npz", "npy")
    }
    assert scores["parquet"] == scores["jsonl"] == scores["npz"] != scores["npy"]  # no mask in .npy
    assert scores["parquet"]["cosine"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images.npy", "images.npz"])
def test_images_without_labels(name: str) -> None:
    save_file(zoo.make("lenet5").state_dict(), "lenet5.safetensors")
    x = pixels(40, 28, 28)
    np.save(name, x) if name.endswith(".npy") else np.savez(name, digits=x)
    arch = ("--arch", "lenet5")
    small = ("-o", "small.safetensors", "--bond", 4, "--calibrate", name, "--device", "cpu", *arch)
    assert answer("compress", "lenet5.safetensors", *small)
    against = ("--reference", "lenet5.safetensors", "--data", name, "--device", "cpu")
    assert answer("eval", "small.safetensors", *against)["scores"].keys() >= {"cosine", "agreement"}
    refused = mpoc("eval", "small.safetensors", "--data", name)
    assert refused.exit_code == 2
    assert f"{name}: has no labels" in refused.output
    assert "--reference" in refused.output


def test_a_token_id_that_the_network_lacks() -> None:
    tiny("bert").save_pretrained("bert")
    write_jsonl(Path("ids.jsonl"), [{"input_ids": [5, 6]}, {"input_ids": [7, 4000]}])
    result = mpoc("compress", "bert", "-o", "small", "--bond", 8, "--calibrate", "ids.jsonl")
    assert result.exit_code == 1
    assert "ids.jsonl, row 1, 'input_ids': token id 4000, but the network has" in " ".join(
        result.output.split()
    )
    assert not Path("small").exists()
