"""``mpoc finetune`` after what goes wrong: several runs resumed, packages that are missing, a full disk."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpoc.cli.guide import read_page
from mpoc.io.safetensors_header import read_header
from mpoc.runtime.signals import Interrupted
from mpoc.train import evaluate
from mpoc.train.finetune import finetune
from mpoc.train.monitor import TrainingEvent, read_log
from mpoc.train.settings import CheckpointInterval, DataOptions, FinetuneRequest, Settings
from tests.support.checkpoints import contents, mlp_state, save_directory
from tests.support.process import Here, Mpoc, run_python
from tests.train.small import blobs

NET = """from torch import nn

def net():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))
"""
TRAIN = ("finetune", "net.pt", "--arch", "net.py:net", "--data", "blobs.npz", "--batch", 16, "--lr", 0.01)


@pytest.fixture
def folder(workdir: Path) -> Path:
    """net.py, net.pt and blobs.npz, 96 examples for training and 48 for testing."""
    (workdir / "net.py").write_text(NET)
    state = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).state_dict()
    torch.save(state, workdir / "net.pt")
    (x, y), (x_test, y_test) = blobs(), blobs(48, seed=1)
    arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    np.savez(workdir / "blobs.npz", allow_pickle=False, **{name: a.numpy() for name, a in arrays.items()})
    return workdir


class Stop(BaseException):
    """As a power cut: nothing tidies up after it."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between", "in the second", "ctrl-c"])
def test_resuming_several_runs_gives_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.chdir(folder)
    settings = Settings(epochs=2.0, batch=16, lr=0.01, patience=5)
    request = FinetuneRequest(
        Path("net.pt"), DataOptions(Path("blobs.npz"), held_out=0.2), settings, arch="net.py:net", runs=3,
        checkpoint_every=CheckpointInterval(steps=4), device="cpu", output=Path("straight.safetensors"),
    )  # fmt: skip
    straight = finetune(request)
    broken = replace(request, output=Path("broken.safetensors"))
    runs = 0

    def say(text: str) -> None:
        nonlocal runs
        runs += text.startswith("run ")
        if runs == 2 and moment == "between":
            raise Stop

    def told(now: TrainingEvent) -> None:
        if runs == 2 and now.step == 5 and now.scores is not None:
            if moment == "in the second":
                raise Stop
            signal.raise_signal(signal.SIGINT)

    with pytest.raises((Stop, Interrupted)):
        finetune(broken, say, told)
    assert broken.checkpoint.exists()
    runs = -9
    done = finetune(replace(broken, resume=True), say, told)
    assert done.training == straight.training
    assert [run["seed"] for run in done.training["runs"]] == [2, 1, 0]
    assert Path("broken.safetensors").read_bytes() == Path("straight.safetensors").read_bytes()
    scored = [
        [line for line in read_log(Path(f"{name}.jsonl")) if "lr" not in line]
        for name in ("straight", "broken")
    ]
    assert scored[0] == scored[1]
    assert not broken.checkpoint.exists()


MISSING = {
    "accelerate": (TRAIN, "train"),
    "matplotlib": ((*TRAIN, "--plot", "curves.svg"), "plot"),
    "pyarrow": ((*TRAIN, "--data", "table.parquet"), "train"),
    "PIL": ((*TRAIN, "--data", "pictures"), "train"),
    "transformers": (("eval", "bert", "--data", "blobs.npz"), "hf"),
}


@pytest.mark.slow
def test_missing_package_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them in one process that has none of them."""
    monkeypatch.chdir(folder)
    (folder / "table.parquet").write_bytes(b"PAR1")
    for place in ("train/a", "train/b"):
        (folder / "pictures" / place).mkdir(parents=True)
        (folder / "pictures" / place / "1.png").write_bytes(b"\x89PNG")
    save_directory(folder / "bert", mlp_state())
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    before = contents(folder)
    commands = {package: [*map(str, words)] for package, (words, _) in MISSING.items()}
    code = f"""if True:
        import json, sys
        sys.dont_write_bytecode = True
        sys.modules |= dict.fromkeys({list(MISSING)})
        from typer.testing import CliRunner
        from mpoc.cli.app import app
        said = {{name: CliRunner().invoke(app, words) for name, words in {commands}.items()}}
        print(json.dumps({{name: [result.exit_code, result.stderr] for name, result in said.items()}}))
    """
    for package, (status, words) in json.loads(run_python("-c", code)).items():
        assert status == 1, (package, words)
        *_, error, hint = words.splitlines()
        assert error.startswith("error: ")
        assert package in error.replace("Pillow", "PIL").replace("pillow", "PIL")
        assert hint.startswith(f"hint: pip install 'mpoc[{MISSING[package][1]}]'")
    assert contents(folder) == before


@pytest.mark.parametrize(("most", "file"), [(3000, "checkpoint.safetensors"), (250, "jsonl")])
def test_full_disk_while_training_keeps_the_last_checkpoint(
    run: Mpoc, here: Here, folder: Path, most: int, file: str
) -> None:
    """From the second checkpoint on no file may grow beyond ``most`` bytes; the first one stays whole."""
    code = f"""if True:
        import resource, shutil, signal
        from mpoc.train.training_checkpoint import CheckpointFile
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = CheckpointFile.save
        def once(self, *values):
            save(self, *values)
            shutil.copyfile(self.path, "first")
            resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))
        CheckpointFile.save = once
    """
    words = (*TRAIN, "--epochs", 4, "--checkpoint-every", 4)
    done = run.after(code, *words)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line or "Traceback" in line]
    assert errors == [f"error: net.tuned.{file}: File too large"], done.stderr
    kept = folder / "net.tuned.checkpoint.safetensors"
    assert kept.read_bytes() == (folder / "first").read_bytes()
    words_of = json.loads(read_header(kept).metadata["record"])
    assert words_of["progress"]["step"] == 4
    assert not list(folder.glob(".*partial"))
    for more in (["--resume"], ["-o", "straight.safetensors"]):
        assert here(*words, *more).returncode == 0
    assert (folder / "net.tuned.safetensors").read_bytes() == (folder / "straight.safetensors").read_bytes()


@pytest.mark.slow
def test_the_guide_names_every_field_of_the_json(
    here: Here, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "LATENCY_SECONDS", 0.01)
    section = (
        read_page("file-format-and-json").partition("The JSON of finetune and eval")[2].partition("\n## ")[0]
    )
    words = {word.removesuffix("[]") for word in re.findall(r"`([^`]*)`", section)}
    measure = ("eval", "net.pt", *TRAIN[2:6], "--latency", "--json")
    for command in ((*TRAIN, "--runs", 2, "--json"), measure, (*measure, "--reference", "net.pt")):
        result = here(*command)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found.keys() | found.get("scores", {}).keys() <= words | {"schema"}
