from __future__ import annotations

import errno
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpoc.compression import source as compression_source
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.pipeline import compress_checkpoint, default_output, in_scratch
from mpoc.compression.recipe import make_recipe
from mpoc.compression.run_context import Progress
from mpoc.compression.write import Compression
from mpoc.errors import MpocError, UsageError
from mpoc.io import safetensors_writer as writer
from mpoc.io.keyed_store import Scratch
from mpoc.io.manifest import LayerRecord
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.runtime.device import choose_device
from mpoc.runtime.formatting import human_bytes
from tests.support.checkpoints import contents, network_state


def compress(source: Path, output: str = "out", dry_run: bool = False, **options: Any) -> Compression:
    ending = "" if source.is_dir() else ".safetensors"
    recipe = make_recipe(None, options)
    return compress_checkpoint(source, source.parent / f"{output}{ending}", recipe, dry_run=dry_run)


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_non_finite_weight_names_file_and_tensor(source: Path, value: float, kind: str) -> None:
    state = network_state()
    state["fc2.weight"][3, 4] = value
    bad = source.parent / "bad.pt"
    torch.save(state, bad)
    before = contents(source.parent)
    with pytest.raises(MpocError, match=rf"tensor 'fc2\.weight' holds {kind}") as caught:
        compress(bad, "bad-out", bond=4)
    assert str(bad) in str(caught.value)
    assert contents(source.parent) == before
    done = compress(bad, "bad-out", bond=4, exclude=("fc2.weight",))  # as the hint says
    assert "fc2.weight" not in [layer.name for layer in done.manifest.layers]


def test_rejects_overflowing_cores(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.randn(64, 64) * 1e30}, tmp_path / "m.pt")
    with pytest.raises(MpocError, match=r"m\.pt: tensor 'fc\.weight': its cores overflow float16"):
        compress(tmp_path / "m.pt", bond=4, dtype="float16")
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt"]


def test_rejects_taken_core_names(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.randn(64, 64), "fc.cores.0": torch.randn(2)}, tmp_path / "m.pt")
    with pytest.raises(MpocError, match=r"tensor 'fc\.cores\.0' has the name that a core of fc would get"):
        compress(tmp_path / "m.pt", bond=4)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt"]


@pytest.mark.parametrize("goal", [{"bond": 10**6}, {"size": 10**9}, {"ratio": 1.0}])
def test_writes_nothing_where_nothing_shrinks(source: Path, goal: dict[str, Any]) -> None:
    before = contents(source.parent)
    with pytest.raises(MpocError, match="no layer would be compressed") as caught:
        compress(source, **goal)
    assert f"--{next(iter(goal))}" in (caught.value.hint or "")
    assert contents(source.parent) == before


def test_rejects_existing_output_before_any_work(source: Path) -> None:
    done = compress(source, bond=2)
    before = contents(source.parent)
    told: list[str] = []
    recipe = make_recipe(None, {"bond": 4})
    with pytest.raises(UsageError, match="exists already"):
        progress = Progress(lambda record, *_: told.append(record.name))
        compress_checkpoint(source, done.output, recipe, progress=progress)
    assert told == []
    assert contents(source.parent) == before
    compress_checkpoint(source, done.output, recipe, force=True)
    assert read_manifest(done.output).options["bond"] == 4


def test_reports_progress_per_layer(source: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def progress(record: LayerRecord, seconds: float, done: int, total: int, share: float) -> None:
        assert seconds >= 0
        assert 0 < share <= 1 and (share == 1) == (done == total)
        told.append((record.name, done, total))

    output = source.parent / ("out" if source.is_dir() else "out.safetensors")
    done = compress_checkpoint(source, output, make_recipe(None, {"bond": 4}), progress=Progress(progress))
    names = [layer.name for layer in done.manifest.layers]
    assert told == [(name, k, len(names)) for k, name in enumerate(names, start=1)]
    assert list(done.seconds) == names


@pytest.mark.parametrize("old", [False, True])
def test_interrupt_changes_nothing(source: Path, old: bool) -> None:
    if old:
        compress(source, bond=2)
    before = contents(source.parent)

    def interrupt(record: LayerRecord, seconds: float, done: int, total: int, share: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    output, recipe = (
        source.parent / ("out" if source.is_dir() else "out.safetensors"),
        make_recipe(None, {"bond": 4}),
    )
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(source, output, recipe, force=True, progress=Progress(interrupt))
    assert contents(source.parent) == before
    assert not [path for path in source.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("write", range(0, 12, 2))
def test_full_disk_changes_nothing(source: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    before = contents(source.parent)
    original, calls = writer._write_tensor, 0

    def fill_up(*arguments: Any) -> None:
        nonlocal calls
        if calls == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        calls += 1
        original(*arguments)

    monkeypatch.setattr(writer, "_write_tensor", fill_up)
    with pytest.raises(OSError, match="No space left") as caught:
        compress(source, bond=4)
    assert str(caught.value.filename).startswith(str(source.parent / "out"))
    assert contents(source.parent) == before
    assert not [path for path in source.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("resnet56.th", "resnet56.mpo.safetensors"),
        ("folder/model.v2.safetensors", "model.v2.mpo.safetensors"),
        ("bert", "bert-mpo"),
        ("bert/", "bert-mpo"),
        (".", "here-mpo"),
        ("bert/..", "here-mpo"),
    ],
)
def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, output: str) -> None:
    (tmp_path / "here" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert default_output(Path(source)) == Path(output)


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "", "cpu:x"])
def test_rejects_unavailable_device(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name}: not available here"):
        choose_device(name)


def test_auto_picks_an_available_device() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu").type == "cpu"


def test_recipe_mixes_forms(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    file = tmp_path / "recipe.toml"
    file.write_text('bond = 4\nform = "svd"\n[layer."1"]\nform = "mpo"\nsites = 3\n')
    torch.save(network.state_dict(), tmp_path / "m.pt")
    done = compress_checkpoint(tmp_path / "m.pt", tmp_path / "o.safetensors", make_recipe(file, {}))
    assert [(layer.form, len(layer.output_factors)) for layer in done.manifest.layers] == [
        ("svd", 2),
        ("mpo", 3),
    ]


def test_svd_layers_ignore_sites(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    file = tmp_path / "recipe.toml"
    file.write_text('bond = 4\nsites = 3\n[layer."1"]\nform = "svd"\n')
    torch.save(network.state_dict(), tmp_path / "m.pt")
    done = compress_checkpoint(tmp_path / "m.pt", tmp_path / "o.safetensors", make_recipe(file, {}))
    assert [layer.form for layer in done.manifest.layers] == ["mpo", "svd"]


def test_memory_holds_all_where_no_folder_can_be_made_beside_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, output = CalibrationRequest("self"), tmp_path / "out.safetensors"
    with in_scratch(request, output) as found:
        assert found is not None and found.scratch is not None and found.scratch.parent == tmp_path
        assert not found.make_scratch().is_required
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "elsewhere/out.safetensors")
    (tmp_path / "elsewhere").mkdir()
    with in_scratch(request, tmp_path / "link.safetensors") as found:
        assert found is not None and found.scratch is not None
        assert found.scratch.parent == tmp_path / "elsewhere"
    with in_scratch(request, tmp_path / "nowhere/out.safetensors") as found:
        assert found is request  # what is wrong with the output is said where it is checked

    def lock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mpoc.io.keyed_store.fcntl.flock", lock)
    with in_scratch(request, output) as found:
        assert found is request
    with pytest.raises(OSError, match="No locks"), in_scratch(replace(request, scratch=tmp_path), output):
        pass


@pytest.mark.parametrize("in_files", [False, True])
def test_files_take_a_part_of_the_memory_that_calibration_needs(
    source: Path, monkeypatch: pytest.MonkeyPatch, in_files: bool
) -> None:
    checkpoint = open_checkpoint(source)
    numbers = sum(info.numel for info in checkpoint.infos.values())
    scratch = Scratch(source.parent if in_files else None, required=False)
    for free, bytes_each in ((19, 8 if in_files else 20), (7, 8 if in_files else 20)):
        monkeypatch.setattr(compression_source, "memory", lambda free=free: (None, free * numbers))
        fits = bytes_each <= free
        refused = pytest.raises(MpocError, match=f"about {human_bytes(bytes_each * numbers)} of memory")
        with nullcontext() if fits else refused:
            compression_source._refuse_to_fill_memory(checkpoint, scratch)
