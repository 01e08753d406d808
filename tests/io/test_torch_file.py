from __future__ import annotations

import argparse
import pickle
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpoc.errors import MpocError
from mpoc.io.open_checkpoint import open_checkpoint
from tests.support.checkpoints import mlp_state

NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
both_formats = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(payload: Any, path: Path, legacy: bool = False) -> Path:
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    return path


def refusal(path: Path) -> MpocError:
    """The error that opening raises; it must name the file."""
    with pytest.raises(MpocError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 1
    return caught.value


def assert_holds(path: Path, state: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.infos) == list(state)
    for name, tensor in state.items():
        info = checkpoint.infos[name]
        assert (info.shape, f"torch.{info.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)


@both_formats
def test_reads_every_dtype_and_shape(tmp_path: Path, legacy: bool) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    state = {f"{dtype}".removeprefix("torch."): torch.randn(5, 3).to(dtype) for dtype in floats}
    state |= {
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "kernel": torch.randn(2, 3, 3, 3),
    }
    assert_holds(save(state, tmp_path / "m.pt", legacy), state)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".ckpt"])
def test_reads_every_suffix(tmp_path: Path, suffix: str) -> None:
    state = mlp_state()
    assert_holds(save(state, tmp_path / f"m{suffix}"), state)


@both_formats
@pytest.mark.parametrize("nest", NESTS)
def test_finds_a_nested_state_dict(tmp_path: Path, nest: str, legacy: bool) -> None:
    state = mlp_state()
    momentum = {"state": {0: {"momentum_buffer": torch.randn(2)}}, "param_groups": [{"lr": 0.1}]}
    path = save({"epoch": 3, "optimizer": momentum, nest: state}, tmp_path / "m.pt", legacy)
    assert_holds(path, state)
    assert open_checkpoint(path).notes == [f"state dict taken from {nest!r}"]


def test_prefers_the_usual_name_to_averages(tmp_path: Path) -> None:
    state = mlp_state()
    average = {name: tensor * 2 for name, tensor in state.items()}
    path = save({"state_dict_ema": average, "state_dict": state}, tmp_path / "m.pt")
    assert_holds(path, state)


def test_finds_a_single_unusual_nest(tmp_path: Path) -> None:
    state = mlp_state()
    assert_holds(save({"student": state, "optim_state": mlp_state()}, tmp_path / "m.pt"), state)


def test_reads_a_plain_state_dict(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert_holds(save(network.state_dict(), tmp_path / "m.pt"), network.state_dict())
    parameters = dict(network.named_parameters())  # nn.Parameter, not plain tensors
    checkpoint = open_checkpoint(save(parameters, tmp_path / "p.pt"))
    assert not checkpoint.read("0.weight").requires_grad


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_strips_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    state = mlp_state()
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    assert_holds(save({"state_dict": wrapped}, tmp_path / "m.pt"), state)


@both_formats
def test_reads_non_contiguous_tensors(tmp_path: Path, legacy: bool) -> None:
    base = torch.randn(6, 8)
    state = {"transposed": base.t(), "strided": base[::2, 1::3], "expanded": torch.randn(4, 1).expand(4, 5)}
    assert_holds(save(state, tmp_path / "m.pt", legacy), state)


@both_formats
def test_reads_tied_tensors_once(tmp_path: Path, legacy: bool) -> None:
    shared, other = torch.randn(6, 4), torch.randn(6, 4)
    state = {"embed.weight": shared, "other.weight": other, "head.weight": shared}
    checkpoint = open_checkpoint(save(state, tmp_path / "m.pt", legacy))
    assert list(checkpoint.infos) == ["embed.weight", "other.weight"]
    assert checkpoint.tied == {"head.weight": "embed.weight"}


@both_formats
def test_different_views_are_not_tied(tmp_path: Path, legacy: bool) -> None:
    base = torch.randn(4, 4)
    state = {"base": base, "transposed": base.t(), "row": base[1], "half": base[:2]}
    state |= {"empty": torch.empty(0, 4), "another": torch.empty(0, 4)}  # both at no address
    path = save(state, tmp_path / "m.pt", legacy)
    assert open_checkpoint(path).tied == {}
    assert_holds(path, state)


@both_formats
def test_accepts_plain_data_beside_tensors(tmp_path: Path, legacy: bool) -> None:
    state = mlp_state()
    payload = {
        "state_dict": state,
        "best_accuracy": np.float64(91.7),
        "loss": np.float32(0.1),
        "history": np.arange(3),
        "args": argparse.Namespace(lr=0.1, arch="resnet20", evaluate=False),
        "epoch": 200,
        "when": None,
    }
    assert_holds(save(payload, tmp_path / "m.pt", legacy), state)


def test_names_entries_that_are_not_tensors(tmp_path: Path) -> None:
    state = mlp_state()
    path = save({**state, "epoch": 3, "args": argparse.Namespace()}, tmp_path / "m.pt")
    assert_holds(path, state)
    assert open_checkpoint(path).notes == ["ignored, not tensors: epoch, args"]


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (lambda: [torch.randn(2, 2)], "holds a list, not a state dict"),
        (lambda: torch.randn(2, 2), "holds a Tensor, not a state dict"),
        (dict, "holds no state dict (nothing)"),
        (lambda: {"epoch": 3, "lr": 0.1}, "holds no state dict (epoch, lr)"),
        (lambda: {"generator": mlp_state(), "critic": mlp_state()}, "several state dicts: generator, critic"),
        (lambda: {"string_to_param": {"*": torch.ones(1, 8)}, "name": "x"}, "a textual inversion"),
        (lambda: {"w": torch.eye(3).to_sparse()}, "tensor 'w' is sparse_coo"),
        (lambda: {"w": torch.empty(3, 3, device="meta")}, "tensor 'w' has a shape but no data"),
        (lambda: {"w": torch.zeros(3, dtype=torch.complex128)}, "tensor 'w' has dtype complex128"),
    ],
)
def test_rejects_files_without_state_dict(tmp_path: Path, payload: Any, said: str) -> None:
    assert said in str(refusal(save(payload(), tmp_path / "m.pt")))


@pytest.mark.parametrize("nested", [True, False])
def test_rejects_optimizer_states(tmp_path: Path, nested: bool) -> None:
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    path = save({"optimizer": state} if nested else state, tmp_path / "m.pt")
    assert "holds no state dict" in str(refusal(path))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_rejects_quantised_tensors(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8)
    assert "tensor 'w' is quantised" in str(refusal(save({"w": quantised}, tmp_path / "m.pt")))


def test_hint_for_several_state_dicts_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    critic, generator = mlp_state(), mlp_state()
    monkeypatch.chdir(tmp_path)
    save({"critic": critic, "generator": generator}, Path("gan.pt"))
    follow(refusal(Path("gan.pt")).hint)
    assert_holds(Path("gan-state.pt"), critic)


@pytest.mark.parametrize(
    "nested",
    [
        {"ema": mlp_state()},
        {"running": {"stat.weight": torch.randn(4, 4)}},
        {"fc1._extra_state": {"amax": torch.ones(2)}},
    ],
    ids=lambda nested: next(iter(nested)),
)
def test_prefers_a_flat_state_dict_to_nested_ones(tmp_path: Path, nested: dict[str, Any]) -> None:
    state = mlp_state()
    for payload in ({**state, **nested}, {"model": {**state, **nested}}):
        path = save(payload, tmp_path / "m.pt")
        assert_holds(path, state)
        assert open_checkpoint(path).notes[-1].endswith(f"beside the state dict: {next(iter(nested))}")


def test_finds_a_state_dict_within_nests(tmp_path: Path) -> None:
    state = mlp_state()
    payload = {"epoch": 3, "checkpoint": {"student": {"net": state}, "optimizer": {"state": {}}}}
    path = save(payload, tmp_path / "m.pt")
    assert_holds(path, state)
    assert open_checkpoint(path).notes == ["state dict taken from 'checkpoint.student.net'"]


def test_prefers_a_usual_nest_to_loose_tensors(tmp_path: Path) -> None:
    state = mlp_state()
    loose = {
        "rng_state": torch.zeros(9, dtype=torch.uint8),
        "loss": torch.tensor(0.5),
        "mean": torch.ones(3, 3),
    }
    assert_holds(save({**loose, "model": state}, tmp_path / "m.pt"), state)
    assert "several state dicts: model beside" in str(
        refusal(save({**state, "model": state}, tmp_path / "m.pt"))
    )


@pytest.mark.parametrize("whole", [False, True])
def test_rejects_stubs_of_zero_3(tmp_path: Path, whole: bool) -> None:
    stub = {name: torch.empty(0) for name in mlp_state()} | (
        {"rope.weight": torch.ones(4, 4)} if whole else {}
    )
    (tmp_path / "global_step3").mkdir()
    path = tmp_path / "global_step3" / "mp_rank_00_model_states.pt"
    error = refusal(save({"module": stub, "ds_config": {}, "ds_version": "0.14"}, path))
    assert "of DeepSpeed ZeRO: tensor 'fc1.weight' is empty" in str(error)
    assert error.hint == f"python -m deepspeed.utils.zero_to_fp32 {tmp_path} {tmp_path.name}-fp32"
    optimizer = save({"optimizer_state_dict": {"fp32": [torch.ones(3)]}, "ds_config": {}}, path)
    assert "its weights are split over the processes" in str(refusal(optimizer))


def follow(hint: str | None) -> None:
    """Run the Python command of a hint as the shell reads it, without a process of its own."""
    assert hint is not None and "python -c " in hint
    python, option, code = shlex.split(hint[hint.index("python -c ") :])
    assert (python, option) == ("python", "-c")
    exec(code, {})


def test_reading_does_not_change_the_file(tmp_path: Path) -> None:
    path = save(mlp_state(), tmp_path / "m.pt")
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    for name in checkpoint.infos:
        checkpoint.read(name)
    assert path.read_bytes() == before


def test_rejects_plain_pickles(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"a": [1, 2, 3]}, protocol=2))
    refusal(path)


def test_accepts_numpy_1_scalars(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "best": np.float64(93.0)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for entry in new.infolist():
            old.writestr(entry.filename, new.read(entry).replace(b"numpy._core", b"numpy.core"))
    assert torch.equal(open_checkpoint(tmp_path / "old.pt").read("a"), torch.ones(2))
