"""``mpoc.compress(model, calibrate=...)`` against the command on the same data, and the batches it takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import mpoc
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from tests.compression.calibrate.test_output_of_interest import folder
from tests.support.architectures import tiny
from tests.support.marks import slow_except

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 6),
    )
"""
OPTIONS: dict[str, Any] = {"ratio": 0.4, "form": "svd"}


def net() -> nn.Module:
    space: dict[str, Any] = {}
    exec(NET, space)
    made: nn.Module = space["net"]()
    return made


def assert_same(network: nn.Module, report: Any, loaded: nn.Module, command: Any) -> None:
    assert report.layers == command.layers
    assert report.manifest.calibration["shares"] == command.calibration["shares"]
    assert {report.manifest.calibration[key] for key in ("samples", "held_out")} == {
        command.calibration[key] for key in ("samples", "held_out")
    }
    assert network.state_dict().keys() == loaded.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """A folder with a network and its data, of which the command draws a part, and these data."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "net.py").write_text(NET)
    torch.save(net().state_dict(), folder / "m.pt")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 3, 9, 9, generator=generator).cumsum(2) / 3, torch.arange(90) % 6
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())
    request = CalibrationRequest(folder / "data.npz", 60)
    recipe = make_recipe(None, {**OPTIONS, "device": "cpu"})
    compress_checkpoint(
        folder / "m.pt", folder / "o.safetensors", recipe, calibrate=request, arch=f"{folder}/net.py:net"
    )
    return folder, x, y


def batches(x: Tensor, y: Tensor, size: int = 13) -> list[Any]:
    return list(zip(x.split(size), y.split(size), strict=True))


LOADERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a loader in order": lambda x, y: DataLoader(TensorDataset(x, y), 7),
    "a loader at random": lambda x, y: DataLoader(TensorDataset(x, y), 7, shuffle=True),
    "a list of tuples": batches,
    "lists": lambda x, y: [list(batch) for batch in batches(x, y)],
    "tensors": lambda x, y: list(x.double().split(11)),
    "one tensor": lambda x, y: x,
    "dicts": lambda x, y: [{"labels": y, "input": x} for x, y in batches(x, y)],
    "one dict": lambda x, y: {"x": x, "y": y},
}


@pytest.mark.parametrize("given", slow_except(LOADERS, "dicts"))
def test_gives_what_the_command_gives(images: tuple[Path, Tensor, Tensor], given: str) -> None:
    folder, x, y = images
    network = net().train()
    report = mpoc.compress(network, calibrate=LOADERS[given](x, y), calibration_samples=60, **OPTIONS)
    assert all(module.training for module in network.modules())
    loaded = mpoc.load(folder / "o.safetensors", net())
    assert_same(network, report, loaded, mpoc.io.manifest_reader.read_manifest(folder / "o.safetensors"))


@pytest.mark.slow
def test_a_path_is_opened_as_the_command_opens_it(images: tuple[Path, Tensor, Tensor]) -> None:
    folder, _, _ = images
    network = net()
    report = mpoc.compress(network, calibrate=folder / "data.npz", calibration_samples=60, **OPTIONS)
    loaded = mpoc.load(folder / "o.safetensors", net())
    assert_same(network, report, loaded, mpoc.io.manifest_reader.read_manifest(folder / "o.safetensors"))
    assert report.manifest.calibration["data"] == {"name": "data.npz"}


@pytest.mark.slow
def test_blocks_are_refined_in_memory(images: tuple[Path, Tensor, Tensor]) -> None:
    _, x, _ = images
    network = net()
    report = mpoc.compress(network, calibrate=x, calibration_samples=40, refine=True, **OPTIONS)
    assert "refined" in report.manifest.calibration


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [False, True])
def test_an_encoder_on_texts(tmp_path: Path, pooled: bool) -> None:
    """Batches padded in any way to any length; pooled as the directory says that the network is from."""
    import transformers

    transformers.BertModel(tiny("bert").config).save_pretrained(tmp_path / "bert")
    if pooled:
        folder(tmp_path / "bert", mean_tokens=True)
    alphabet = "".join(map(chr, range(33, 33 + 99)))  # as many as the network knows
    texts = [(alphabet * 2)[8 * k % 99 :][: 4 + 3 * (k % 5)] for k in range(48)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = make_recipe(None, {"ratio": 0.4, "device": "cpu"})
    command = compress_checkpoint(
        tmp_path / "bert", tmp_path / "out", recipe, calibrate=tmp_path / "texts.jsonl"
    )
    characters = sorted({character for text in texts for character in text})
    tokens = [torch.tensor([characters.index(character) for character in text]) for text in texts]

    def batch(part: list[Tensor]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in part], batch_first=True)
        return {
            "labels": torch.zeros(len(part)),
            "attention_mask": mask,
            "input_ids": ids,
            "index": ids[:, 0],
        }

    loader: DataLoader[Tensor] = DataLoader(tokens, 5, collate_fn=batch)  # type: ignore[arg-type]
    for given in (loader, list(loader)):
        network = transformers.BertModel.from_pretrained(tmp_path / "bert")
        report = mpoc.compress(network, ratio=0.4, calibrate=given)
        loaded = mpoc.load(tmp_path / "out")
        assert_same(network, report, loaded, command.manifest)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_of_a_stream_the_first_examples_are_taken() -> None:
    streamed, listed = (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6)) for _ in range(2))
    listed.load_state_dict(streamed.state_dict())
    one = mpoc.compress(streamed, ratio=0.5, calibrate=DataLoader(Stream(), 30), calibration_samples=100)
    other = mpoc.compress(listed, ratio=0.5, calibrate=[torch.stack(list(Stream())[:100])])
    assert one.layers == other.layers
    assert (one.manifest.calibration["samples"], one.manifest.calibration["held_out"]) == (88, 8)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 32), nn.Linear(12, 32)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.left(left) * self.right(right)


@pytest.mark.slow
def test_several_inputs_go_by_position_or_by_name() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(80, 16, generator=generator), torch.randn(80, 12, generator=generator)
    networks = [TwoInputs()]
    networks += [copy.deepcopy(networks[0])]
    reports = [
        mpoc.compress(network, ratio=0.5, calibrate=[given])
        for network, given in zip(networks, [(left, right), {"right": right, "left": left}], strict=True)
    ]
    assert reports[0].layers == reports[1].layers
    assert all(layer.held_out_error is not None for layer in reports[0].layers)


@pytest.mark.slow
def test_half_precision_is_calibrated_in_float32() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6)).bfloat16()
    x = torch.randn(80, 16).bfloat16()
    report = mpoc.compress(whole, ratio=0.5, calibrate=[x])
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    assert whole(x).isfinite().all()
    assert 0 < (report.layers[0].held_out_error or 0) < 0.9


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.layer(x)}


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ([], MpocError, "list yields no batches"),
        (iter([]), MpocError, "yields no batches"),
        (DataLoader(TensorDataset(torch.zeros(0, 16))), MpocError, "0 examples"),
        ([torch.zeros(1, 16)], MpocError, "1 examples in batches: calibration needs two"),
        (7, UsageError, "a int is no path and no iterable of batches"),
        (["text"], UsageError, "a batch is a str: it must be a tensor"),
        ([()], UsageError, "a batch is a tuple: it must be a tensor"),
        (
            [{"image": torch.zeros(3, 16), "mask": torch.zeros(3)}],
            UsageError,
            "holds image, mask, and",
        ),
        ([{"input": "text"}], UsageError, "holds input 'text'"),
        ([torch.zeros(4, 16), torch.zeros(4, 15)], UsageError, r"batches differ: x .* \(16,\) and \(15,\)"),
        ([torch.zeros(4, 15)], UsageError, r"the network does not take x of shape \(1, 15\) float32"),
        (Path("nowhere.npz"), MpocError, "nowhere.npz"),
    ],
)
def test_what_is_refused(given: Any, error: type[MpocError], said: str) -> None:
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(error, match=said):
        mpoc.compress(network, ratio=0.5, calibrate=given)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_refuses_outputs_without_a_tensor_in_front() -> None:
    with pytest.raises(UsageError, match="the network returns a dict"):
        mpoc.compress(Outputs(), ratio=0.5, calibrate=torch.zeros(8, 16))


def test_options_of_a_calibration_require_one() -> None:
    with pytest.raises(UsageError, match="calibration_samples requires calibrate"):
        mpoc.compress(nn.Linear(16, 32), ratio=0.5, calibration_samples=8)
    with pytest.raises(UsageError, match="refine requires calibrate"):
        mpoc.compress(nn.Linear(16, 32), ratio=0.5, refine=True)
