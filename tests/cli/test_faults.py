"""What goes wrong from outside: one message, the right exit status, nothing left behind, inputs untouched."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import contents, mlp_state, network_state, save_directory
from tests.support.process import Here, Mpoc


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def truncated(folder: Path, suffix: str, legacy: bool = False) -> Path:
    from safetensors.torch import save_file

    file = folder / f"m{suffix}"
    if suffix == ".safetensors":
        save_file(mlp_state(), file)
    else:
        torch.save(mlp_state(), file, _use_new_zipfile_serialization=not legacy)
    file.write_bytes(file.read_bytes()[:-1000])
    return file


def poisoned(folder: Path, value: float) -> Path:
    state = mlp_state()
    state["fc2.weight"][1, 2] = value
    torch.save(state, folder / "m.pt")
    return folder / "m.pt"


def malicious(folder: Path, plain: bool) -> Path:
    payload = {"state_dict": mlp_state(), "x": Malice(folder.parent / "touched")}
    torch.save(payload, folder / "m.pt")
    if plain:
        (folder / "m.pt").write_bytes(pickle.dumps(payload))
    return folder / "m.pt"


def without_a_shard(folder: Path) -> Path:
    source = save_directory(folder / "m", mlp_state(), shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    return source


BROKEN_INPUTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "truncated safetensors": (
        lambda folder: truncated(folder, ".safetensors"),
        ["m.safetensors: truncated: 1000 bytes missing", "tensor 'fc2.weight'"],
    ),
    "truncated torch file": (lambda folder: truncated(folder, ".pt"), ["m.pt: ", "truncated"]),
    "truncated old torch file": (lambda folder: truncated(folder, ".th", True), ["m.th: ", "truncated"]),
    "NaN": (lambda folder: poisoned(folder, float("nan")), ["m.pt: tensor 'fc2.weight' holds NaN"]),
    "Inf": (lambda folder: poisoned(folder, float("inf")), ["m.pt: tensor 'fc2.weight' holds infinite"]),
    "code": (lambda folder: malicious(folder, False), ["m.pt: loading it would run code", "system"]),
    "code in a plain pickle": (lambda folder: malicious(folder, True), ["m.pt: ", "so it was not loaded"]),
    "missing shard": (
        without_a_shard,
        ["index.json: shard model-00002-of-00002.safetensors is missing", "'fc2.weight'"],
    ),
}


def assert_fails(done: subprocess.CompletedProcess[str], status: int, *said: str) -> None:
    """One error message, on stderr, that says all of ``said``; nothing on stdout."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.stderr.count("error:") == len(errors) == 1
    for text in said:
        assert text in errors[0]


@pytest.mark.parametrize("fault", BROKEN_INPUTS)
def test_rejects_broken_inputs(here: Here, tmp_path: Path, fault: str) -> None:
    make, said = BROKEN_INPUTS[fault]
    folder = tmp_path / "inputs"
    folder.mkdir()
    source = make(folder)
    before = contents(folder)
    done = here("compress", source, "--bond", 4)
    assert_fails(done, 1, *said)
    assert list(here.folder.iterdir()) == []
    assert contents(tmp_path) == {f"inputs/{name}": data for name, data in before.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.save(mlp_state(), tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bond", "0"], "--bond 0: the bond dimension must be positive"),
        (["--bond", "-3"], "--bond -3: the bond dimension must be positive"),
        (["--bond", "4", "--ratio", "0.5"], "given: --bond and --ratio"),
        (["--bond", "4", "--shape", "fc1=4x4x4:4x4x4"], "4×4×4 = 64 inputs and 4×4×4 = 64 outputs"),
        (["--bond", "4", "--layers", "encoder.*"], "--layers 'encoder.*' matches no tensor"),
        (["--bond", "4", "--exclude", "fc3"], "matches no tensor; did you mean 'fc2'?"),
        (["--recipe", "recipe.toml"], "recipe.toml: unknown key 'bnod'; did you mean 'bond'?"),
        (["--recipe", "nowhere.toml", "--bond", "4"], "nowhere.toml: no such recipe file"),
        (["--bond", "4", "-o", "recipe.toml"], "recipe.toml: exists already"),
        (["--bond", "4", "-o", "m.pt", "--force"], "m.pt: would write over or into the input"),
    ],
)
def test_rejects_bad_options(
    here: Here, model: Path, options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    Path("recipe.toml").write_text("bnod = 4\n")
    before = contents(model.parent)
    assert_fails(here("compress", "m.pt", *options), 2, said)
    assert contents(model.parent) == before


@pytest.mark.parametrize("option", ["--ratio", "--max-error"])
def test_reads_percentages(here: Here, model: Path, option: str) -> None:
    both = [here("compress", model, option, text, "--dry-run", "--json") for text in ("0.5", "50%")]
    shares, percentages = ([layer["bonds"] for layer in json.loads(done.stdout)["layers"]] for done in both)
    assert percentages == shares
    done = here("compress", model, option, "half")
    assert (done.returncode, done.stdout) == (2, "")
    hint = "hint: write a share as 0.5 or 50%"
    assert done.stderr == f"error: {option}: 'half' is not a number\n{hint}\n"


def test_explains_how_to_download_a_hub_id(here: Here) -> None:
    for hub_id in ("bert-base-uncased", "org/name"):
        done = here("compress", hub_id, "--ratio", 0.5)
        assert_fails(done, 2, f"{hub_id}: no such file or directory")
        assert f"hf download {hub_id}" in done.stderr
        assert list(here.folder.iterdir()) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk("size=64k")``: a small file system of its own, where the tests may mount one."""
    place = tmp_path / "disk"
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_full_disk_leaves_nothing_behind(
    here: Here, tmp_path: Path, disk: Callable[[str], Path], kind: str, request: pytest.FixtureRequest
) -> None:
    state = {**network_state(), "ballast": torch.zeros(60_000)}
    source = tmp_path / "m.pt"
    if kind == "directory":
        source = save_directory(tmp_path / "m", state)
    else:
        torch.save(state, source)
    before = contents(tmp_path)
    output = disk("size=160k") / "out.safetensors"
    done = here("compress", source, "--bond", 4, "-o", output)
    assert_fails(done, 1, f"{output}: No space left on device")
    assert "hint: free disk space" in done.stderr
    assert contents(output.parent) == {}
    assert list(output.parent.iterdir()) == []
    assert contents(tmp_path) == before


def test_full_disk_names_the_output(here: Here, tmp_path: Path, disk: Callable[[str], Path]) -> None:
    source = save_directory(tmp_path / "m", mlp_state())
    (source / "tokenizer.json").write_bytes(bytes(100_000))
    output = disk("size=64k") / "out"
    done = here("compress", source, "--bond", 4, "-o", output)
    assert_fails(done, 1, f"{output}: No space left on device")
    assert list(output.parent.iterdir()) == []


def test_reports_an_unwritable_directory(here: Here, model: Path, disk: Callable[[str], Path]) -> None:
    if os.geteuid():
        folder = model.parent / "locked"
        folder.mkdir(mode=0o500)
    else:
        folder = disk("ro")  # permissions do not stop root; a read-only file system does
    done = here("compress", model, "--bond", 4, "-o", folder / "out.safetensors")
    assert_fails(done, 1, f"no permission to write in {folder}")
    assert list(folder.iterdir()) == []


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Work of some seconds in many layers."""
    folder = tmp_path / "large"
    state = {f"layers.{k}.weight": torch.randn(512, 512) for k in range(60)}
    return save_directory(folder, state, config={"model_type": "test"})


@pytest.mark.parametrize(
    ("signum", "status", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
)
@pytest.mark.parametrize("old", [False, True])
def test_signal_while_compressing_leaves_the_old_output(
    run: Mpoc, large: Path, signum: signal.Signals, status: int, said: str, old: bool
) -> None:
    before = contents(large)
    output = run.folder / "large-mpo"
    if old:
        save_directory(output, mlp_state())
    previous = contents(run.folder)
    options = ["--device", "cpu", *(["--force"] if old else [])]
    process = run.start("compress", large, "--max-error", 0.9, *options)
    assert process.stderr is not None
    assert any("[2/60]" in line for line in process.stderr)
    assert [path.name for path in run.folder.iterdir() if path.name.endswith(".partial")]  # at work
    process.send_signal(signum)
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, err
    assert out == ""
    assert "[60/60]" not in err
    words = [line for line in err.splitlines() if not line.startswith("[")]
    assert words == [f"error: {said}", f"note: large-mpo is {'as it was' if old else 'not written'}"]
    assert contents(run.folder) == previous
    assert list(run.folder.iterdir()) == ([output] if old else [])
    assert contents(large) == before


def test_signal_before_compressing_leaves_nothing(run: Mpoc, large: Path) -> None:
    process = run.start("compress", large, "--max-error", 0.9, "--device", "cpu")
    assert process.stderr is not None
    assert process.stderr.readline() == "device cpu\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err.count("error:") == 1
    assert list(run.folder.iterdir()) == []


@pytest.mark.parametrize("fault", ["missing core", "missing shard"])
def test_rejects_broken_compressed_directories(here: Here, tmp_path: Path, fault: str) -> None:
    from safetensors.torch import load_file, save_file

    source = save_directory(tmp_path / "m", mlp_state())
    assert here("compress", source, "--bond", 4, "--max-shard-size", "1kB", "--quiet").returncode == 0
    output = here.folder / "m-mpo"
    index_file = output / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = index["weight_map"]["fc1.cores.1"]
    if fault == "missing core":
        del index["weight_map"]["fc1.cores.1"]
        index_file.write_text(json.dumps(index))
        rest = {name: value for name, value in load_file(output / shard).items() if name != "fc1.cores.1"}
        save_file(rest, output / shard, {"format": "pt"})
    else:
        (output / shard).unlink()
    before = contents(here.folder)
    said = "core 'fc1.cores.1' is missing" if fault == "missing core" else f"shard {shard} is missing"
    assert_fails(here("expand", "m-mpo"), 1, "m-mpo", said)
    assert contents(here.folder) == before
