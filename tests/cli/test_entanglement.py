from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support.checkpoints import mlp_state
from tests.support.process import Here


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.save(mlp_state(), tmp_path / "m.pt")
    compress_checkpoint(tmp_path / "m.pt", tmp_path / "small.safetensors", make_recipe(None, {"bond": 4}))
    return tmp_path / "m.pt"


def test_prints_a_table(here: Here, model: Path) -> None:
    done = here("entanglement", model, "--weight", 0.5, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "D for 50 %" in done.stdout and "S stored" not in done.stdout
    assert {"fc1", "fc2"} <= {line.split()[0] for line in done.stdout.splitlines() if line.split()}


@pytest.mark.slow
def test_against_adds_stored_entropies_and_plot_writes_a_figure(here: Here, model: Path) -> None:
    pytest.importorskip("matplotlib")
    small = model.with_name("small.safetensors")
    done = here("entanglement", model, "--against", small, "--plot", "entropy.svg")
    assert done.returncode == 0, done.stderr
    assert "S stored" in done.stdout and "[1/2] fc1" in done.stderr
    assert "wrote entropy.svg" in done.stderr
    assert "<svg" in (here.folder / "entropy.svg").read_text()


def test_json_holds_normalised_spectra(here: Here, model: Path) -> None:
    done = here("entanglement", model, "--layers", "fc1", "--json", "--quiet")
    found = json.loads(done.stdout)
    assert found["schema"] == "mpoc.entanglement/1"
    (layer,) = found["layers"]
    for cut in layer["cuts"]:
        p = [value**2 for value in cut["spectrum"]]
        assert sum(p) == pytest.approx(1)
        assert cut["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p if x > 0))
        assert cut["largest_entropy"] == pytest.approx(math.log(len(p)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weight", "1"], "lies between 0 and 1"),
        (["--against", "missing.safetensors"], "no such file"),
        (["--plot", "x.gif"], "the name of a picture must end in"),
        (["--shape", "fc1=2x2:2x2"], "the layer has 48 and 64"),
    ],
)
def test_rejects_bad_options(here: Here, model: Path, options: list[str], said: str) -> None:
    done = here("entanglement", model, *options)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
