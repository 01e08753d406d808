"""Torch files that are cut off, overwritten, or would run code."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpoc.errors import MpocError
from mpoc.io.open_checkpoint import open_checkpoint
from tests.io.test_torch_file import assert_holds, both_formats, follow, refusal, save
from tests.support.checkpoints import mlp_state


class Training:
    """A class of somebody's own, as pickled into a checkpoint."""


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@both_formats
@pytest.mark.parametrize("place", ["alone", "beside", "among"])
def test_never_runs_code(tmp_path: Path, place: str, legacy: bool) -> None:
    malice = Malice(tmp_path / "touched")
    payload = {
        "alone": malice,
        "beside": {"state_dict": mlp_state(), "x": malice},
        "among": {**mlp_state(), "x": malice},
    }[place]
    path = save(payload, tmp_path / "m.pt", legacy)
    error = refusal(path)
    assert not malice.target.exists()
    assert "would run code" in str(error)
    torch.load(path, weights_only=False)  # it is live: torch's unsafe reader does run it
    assert malice.target.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_never_runs_code_of_a_plain_pickle(tmp_path: Path, protocol: int) -> None:
    malice = Malice(tmp_path / "touched")
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"x": malice}, protocol=protocol))
    refusal(tmp_path / "m.pt")
    assert not malice.target.exists()


@both_formats
@pytest.mark.parametrize("place", ["alone", "model", "beside"])
def test_rejects_pickled_classes_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, legacy: bool
) -> None:
    network = nn.Sequential(OrderedDict(fc1=nn.Linear(48, 64), fc2=nn.Linear(64, 32)))
    payload: Any = {
        "alone": network,
        "model": {"model": network, "epoch": 3},
        "beside": {"state_dict": network.state_dict(), "training": Training()},
    }[place]
    monkeypatch.chdir(tmp_path)
    error = refusal(save(payload, Path("m.pt"), legacy))
    assert "would run code (" in str(error)
    follow(error.hint)
    assert_holds(Path("m-state.pt"), network.state_dict())


@pytest.mark.parametrize("name", ["it's.ckpt", "a$(touch PASTED)b.ckpt", "two words.ckpt"])
def test_hints_are_quoted_for_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    state = mlp_state()
    monkeypatch.chdir(tmp_path)
    error = refusal(save({"net": state, "training": Training()}, Path(name)))
    follow(error.hint)
    assert_holds(Path(f"{Path(name).stem}-state.pt"), state)
    assert not Path("PASTED").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_rejects_late_protocols_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    state = mlp_state()
    monkeypatch.chdir(tmp_path)
    torch.save(state, "m.pt", pickle_protocol=4, _use_new_zipfile_serialization=not legacy)
    error = refusal(Path("m.pt"))
    assert "protocol 4" in str(error)
    follow(error.hint)
    assert_holds(Path("m-state.pt"), state)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_rejects_torchscript_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Linear(4, 3)
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.trace(network, torch.randn(1, 4)), "m.pt")
    error = refusal(Path("m.pt"))
    assert "a TorchScript archive" in str(error)
    follow(error.hint)
    assert_holds(Path("m-state.pt"), dict(network.state_dict()))


@both_formats
def test_rejects_truncation_at_every_length(tmp_path: Path, legacy: bool) -> None:
    whole = save(mlp_state(), tmp_path / "m.pt", legacy).read_bytes()
    cut = tmp_path / "cut.pt"
    lengths = {*range(0, 600, 7), *range(600, len(whole), 499), len(whole) - 20, len(whole) - 1}
    for length in sorted(lengths):
        cut.write_bytes(whole[:length])
        error = refusal(cut)
        assert "truncated or damaged" in str(error), f"{length} of {len(whole)} bytes: {error}"
        assert error.hint == "download or copy it again"  # the way out of code would be bad advice here


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello world\n",
        b"\x00" * 1000,
        b"PK\x03\x04 and then nothing of a zip",
    ],
)
def test_rejects_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    error = refusal(tmp_path / "m.pt")
    assert "not a torch file" in str(error)
    assert "weights_only" not in f"{error} {error.hint}"  # torch's own text advises to load it unsafely


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    payload = {"state_dict": {"a.weight": torch.randn(3, 4), "b": torch.randn(2)}, "epoch": 3}
    formats = [save(payload, folder / "m.pt", legacy).read_bytes() for legacy in (False, True)]
    return folder / "damaged.pt", formats[0], formats[1]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.booleans(), st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_byte_is_read_or_rejected(
    whole_files: tuple[Path, bytes, bytes], legacy: bool, at: int, value: int
) -> None:
    path, zipped, old = whole_files
    damaged = bytearray(old if legacy else zipped)
    damaged[at % len(damaged)] = value
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(path)
    except MpocError as error:
        assert str(path) in str(error)
    else:
        for name in checkpoint.infos:
            checkpoint.read(name)
