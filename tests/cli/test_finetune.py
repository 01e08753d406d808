"""``mpoc finetune`` and ``mpoc eval``, as processes where that counts, on scikit-learn's digits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.demo.data import load_digits
from mpoc.io.manifest_reader import read_manifest
from mpoc.train import evaluate
from mpoc.train.monitor import read_log
from tests.support.process import Here, Mpoc, environment

NET = """import os, time
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)
        )

    def forward(self, x):
        if self.training:
            time.sleep(float(os.environ.get("SLOWLY", 0)))
        return super().forward(x)
"""
TRAIN = ("--arch", "net.py:Net", "--data", "digits.npz", "--lr", "0.01", "--batch", "50")


@pytest.fixture
def folder(workdir: Path) -> Path:
    """net.py, net.pt, net.mpo.safetensors, and digits.npz with a training and a test split."""
    (workdir / "net.py").write_text(NET)
    x, y, x_test, y_test = load_digits()
    arrays = {"x_train": _bytes(x), "y_train": y, "x_test": _bytes(x_test), "y_test": y_test}
    np.savez(workdir / "digits.npz", allow_pickle=False, **{n: v.numpy() for n, v in arrays.items()})
    torch.save(network().state_dict(), workdir / "net.pt")
    recipe = make_recipe(None, {"bond": 6, "sites": 2, "allow_growth": True})
    compress_checkpoint(workdir / "net.pt", workdir / "net.mpo.safetensors", recipe)
    return workdir


def _bytes(images: Tensor) -> Tensor:
    return (images * 15).byte()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)
    )


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.name != "__pycache__"}


BEFORE = {"net.py", "net.pt", "net.mpo.safetensors", "digits.npz"}


@pytest.mark.slow
def test_finetune_expand_report_and_eval_agree(here: Here, folder: Path) -> None:
    scaled = ("--mean", 0.3, "--std", 0.5)
    done = here("finetune", "net.mpo.safetensors", *TRAIN, *scaled, "--epochs", 6, "--plot", "curves.svg")
    assert done.returncode == 0, done.stderr
    assert "digits.npz: npz; train 1,258, test 539; images 1×8×8; 10 classes" in done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "wrote net.tuned.safetensors", "next: mpoc report net.tuned.safetensors",
    ]  # fmt: skip
    assert files(folder) == BEFORE | {"net.tuned.safetensors", "net.tuned.jsonl", "curves.svg"}
    manifest = read_manifest(folder / "net.tuned.safetensors")
    training = manifest.training
    assert training["final"]["accuracy"] > 85 > 30 > training["start"]["accuracy"]
    assert all(layer.relative_error is None for layer in manifest.replaced)
    before = read_manifest(folder / "net.mpo.safetensors")
    for tuned, layer in zip(manifest.replaced, before.replaced, strict=True):
        assert len(tuned.entropies) == len(layer.entropies)
        assert tuned.entropies != layer.entropies
    # the same accuracy, by hand, of what expand gives
    expand_checkpoint(folder / "net.tuned.safetensors", folder / "dense.safetensors")
    dense = network()
    dense.load_state_dict(load_file(folder / "dense.safetensors"))
    _, _, x, y = load_digits()
    right = 100 * float((dense.eval()((_bytes(x) / 255 - 0.3) / 0.5).argmax(1) == y).float().mean())
    assert right == pytest.approx(training["final"]["accuracy"], abs=0.2)
    report = here("report", "net.tuned.safetensors")
    assert "fine-tuned on digits.npz: 156 steps of classification, accuracy" in report.stdout
    log = read_log(folder / "net.tuned.jsonl")
    assert [line["step"] for line in log if "split" in line] == [26 * k for k in range(7)]
    # eval takes the mean and the deviation from the record
    measured = here("eval", "net.tuned.safetensors", "--data", "digits.npz", "--arch", "net.py:Net", "--json")
    assert json.loads(measured.stdout)["scores"]["accuracy"] == training["final"]["accuracy"]


def test_resume_after_a_kill_gives_the_same_bytes(
    run: Mpoc, here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["finetune", "net.mpo.safetensors", *TRAIN, "--epochs", "3", "--pad", "1", "--patience", "5"]
    options += ["--checkpoint-every", "7"]
    assert here(*options, "-o", "straight.safetensors").returncode == 0
    monkeypatch.setenv("SLOWLY", "0.02")
    process = run.start(*options, "-o", "broken.safetensors")
    kept = folder / "broken.checkpoint.safetensors"
    deadline = time.monotonic() + 60
    while not (kept.exists() and kept.stat().st_mtime_ns and _step(kept) >= 35):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "broken.safetensors").exists()
    monkeypatch.setenv("SLOWLY", "0")
    refused = here(*options, "-o", "broken.safetensors")
    assert (refused.returncode, "--resume continues it" in refused.stderr) == (2, True)
    other = here(*options, "-o", "broken.safetensors", "--resume", "--seed", 1)
    assert (other.returncode, "seed 0 there, 1 here" in other.stderr) == (2, True)
    done = here(*options, "-o", "broken.safetensors", "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert (folder / "broken.safetensors").read_bytes() == (folder / "straight.safetensors").read_bytes()
    scored = [
        [line for line in read_log(folder / f"{name}.jsonl") if "split" in line]
        for name in ("broken", "straight")
    ]
    assert scored[0] == scored[1]
    assert not kept.exists()


def _step(path: Path) -> int:
    from mpoc.io.safetensors_header import read_header

    return int(json.loads(read_header(path).metadata["record"])["progress"]["step"])


def test_ctrl_c_saves_a_checkpoint_and_prints_how_to_resume(
    run: Mpoc, here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOWLY", "0.05")
    options = ("finetune", "net.mpo.safetensors", *TRAIN, "--epochs", 2)
    process = run.start(*options)
    log = folder / "net.tuned.jsonl"
    while not (log.exists() and '"lr"' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved net.tuned.checkpoint.safetensors" in said
    again = said.splitlines()[-1]
    assert again == f"next: mpoc {' '.join(map(str, options))} --resume"
    monkeypatch.setenv("SLOWLY", "0")
    assert here(*options, "--resume").returncode == 0
    assert files(folder) == BEFORE | {"net.tuned.safetensors", "net.tuned.jsonl"}


@pytest.mark.slow
def test_two_processes_train_like_one(here: Here, folder: Path) -> None:
    """At the same global batch; without dropout and batch norm, which differ by process."""
    (folder / "plain.py").write_text(
        "from torch import nn\n\ndef net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))\n"
    )
    torch.manual_seed(0)
    state = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).state_dict()
    torch.save(state, folder / "plain.pt")
    words = ["finetune", "plain.pt", "--arch", "plain.py:net", "--data", "digits.npz", "--optimizer", "sgd"]
    words += ["--lr", "0.1", "--l2", "0.0001", "--epochs", "1", "--batch", "50", "--device", "cpu"]
    assert here(*words, "-o", "one.safetensors").returncode == 0
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mpoc",
         *words, "-o", "two.safetensors"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("wrote two.safetensors") == 1
    one, other = load_file(folder / "one.safetensors"), load_file(folder / "two.safetensors")
    assert one.keys() == state.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)
    assert not torch.equal(one["1.weight"], state["1.weight"])
    evaluations = [read_log(folder / f"{name}.jsonl")[-1] for name in ("one", "two")]
    assert evaluations[0]["accuracy"] == pytest.approx(evaluations[1]["accuracy"], abs=0.2)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--data", "digits.npz"), 2, "holds tensors, not the network's code"),
        ((*TRAIN, "--image-size", "9x9"), 2, "the network does not take x of shape (2, 1, 9, 9) float32"),
        ((*TRAIN, "--data", "absent.npz"), 2, "absent.npz: no such file"),
        ((*TRAIN, "--mean", "0.5,0.5,0.5", "--std", "1"), 2, "3 means for images of 1 channels"),
        ((*TRAIN, "--lr", "1e30"), 1, "the loss is"),
        ((*TRAIN, "--task", "causal-lm"), 2, "is not text"),
        ((*TRAIN, "--hold-out", "0", "--patience", "2"), 2, "there is none"),
        ((*TRAIN, "-o", "net.mpo.safetensors"), 2, "would write over or into the input"),
        ((*TRAIN, "--plot", "curves.jpeg2"), 2, "the name of a picture must end in"),
        ((*TRAIN, "--block", "0"), 2, "the block length must be a positive integer"),
        ((*TRAIN, "--checkpoint-every", "soon"), 2, "neither steps nor seconds"),
        ((*TRAIN, "--steps", "2", "--epochs", "1"), 2, "--epochs and --steps exclude each other"),
    ],
)
def test_rejects_bad_options_and_writes_nothing(
    here: Here, folder: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    result = here("finetune", "net.mpo.safetensors", *words)
    assert result.returncode == status, result.stderr
    assert said in result.stderr
    assert files(folder) == BEFORE


@pytest.mark.parametrize(
    "words",
    [
        ("--log", "net.mpo.safetensors"),
        ("--log", "data/digits.npz"),
        ("--log", "net.tuned.safetensors"),
        ("--teacher", "dense.safetensors", "-o", "dense.safetensors"),
        ("--data", "data.safetensors", "-o", "data.safetensors"),
    ],
)
def test_force_never_replaces_an_input(here: Here, folder: Path, words: tuple[str, ...]) -> None:
    (folder / "data").mkdir()
    (folder / "digits.npz").rename(folder / "data" / "digits.npz")
    x, y, _, _ = load_digits()
    save_file({"x": _bytes(x), "y": y}, folder / "data.safetensors")
    save_file(network().state_dict(), folder / "dense.safetensors")
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
    train = ("--arch", "net.py:Net", "--data", "data", "--steps", "1", "--force")
    result = here("finetune", "net.mpo.safetensors", *train, *words)
    assert result.returncode == 2, result.stderr
    assert "would write over or into" in result.stderr or "written twice" in result.stderr
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.slow
def test_full_disk_leaves_no_partial_output(folder: Path) -> None:
    """The output cannot be written; nothing half-written stays."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from mpoc.cli.app import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "finetune", "net.mpo.safetensors", *TRAIN],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "net.tuned.safetensors: File too large" in done.stderr
    assert files(folder) == BEFORE


def test_eval_measures_fidelity_to_a_reference(
    here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "LATENCY_SECONDS", 0.01)
    words = ("eval", "net.mpo.safetensors", "--data", "digits.npz", "--arch", "net.py:Net", "--json")
    found = json.loads(here(*words, "--reference", "net.pt", "--latency", "--batch", 64).stdout)
    _, _, x, _ = load_digits()
    x = _bytes(x).float() / 255
    outputs = []
    expand_checkpoint(folder / "net.mpo.safetensors", folder / "dense.safetensors")
    for state in (load_file(folder / "dense.safetensors"), torch.load(folder / "net.pt", weights_only=True)):
        net = network().eval()
        net.load_state_dict(state)
        with torch.no_grad():
            outputs.append(net(x))
    cosine = nn.functional.cosine_similarity(*outputs).mean()
    p, q = (o.double().softmax(1) for o in outputs[::-1])
    scores = found["scores"]
    assert scores["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    assert scores["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), abs=1e-4)
    agree = (outputs[0].argmax(1) == outputs[1].argmax(1)).double().mean()
    assert scores["agreement"] == pytest.approx(100 * float(agree), abs=0.2)
    assert [line["batch"] for line in found["latency"]] == [1, 64]
    assert all(line["ms"] > 0 and line["dense_ms"] > 0 for line in found["latency"])


def test_compress_eval_scores_before_and_after(here: Here, folder: Path) -> None:
    words = ("compress", "net.pt", "--bond", 4, "--sites", 2, "--arch", "net.py:Net", "-o", "c.safetensors")
    done = here(*words, "--eval", "digits.npz", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["evaluation"]
    for key, file in (("before", "net.pt"), ("after", "c.safetensors")):
        alone = here("eval", file, "--data", "digits.npz", "--arch", "net.py:Net", "--json")
        assert json.loads(alone.stdout)["scores"] == found[key]["scores"]
    report = json.loads(here("report", "c.safetensors", "--json").stdout)
    assert report["measured"]["after"] == found["after"]["scores"]
    assert report["headline"] == json.loads(done.stdout)["headline"] != ""
    assert here("report", "c.safetensors").stdout.splitlines()[0] == report["headline"]
    refused = here(*words, "--eval", "digits.npz", "--dry-run")
    assert (refused.returncode, "--dry-run writes nothing" in refused.stderr) == (2, True)
