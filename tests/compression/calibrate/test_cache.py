"""A dense pass in a file and back, and files that are something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpoc.compression.calibrate import moments as moments_module
from mpoc.compression.calibrate.cache import (
    DensePass,
    KeptTensors,
    cached_or_measured,
    calibration_fingerprint,
)
from mpoc.compression.calibrate.dense_pass import Probes, dense_pass
from mpoc.compression.calibrate.trace import Trace, trace
from mpoc.errors import MpocError
from mpoc.io.keyed_store import Scratch, open_item, put_item
from mpoc.io.safetensors_header import read_header
from mpoc.io.safetensors_writer import Entry
from mpoc.models.call import Batch, Call
from mpoc.tensor_networks.fit.second_moment import RowMoment
from tests.compression.calibrate.networks import encoder, resnet20, texts, weights
from tests.support.checkpoints import contents

PARTS = {"weights": "a", "data": "b"}


class Grouped(nn.Module):
    """An embedding, a convolution with groups and a linear layer, without a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.last = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, groups=4), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.last(self.conv(self.embed(input_ids).mT).mean(-1))


class Case:
    """A network with its pass, and how often that was asked for."""

    def __init__(self, network: nn.Module, batch: Batch, path: Path) -> None:
        self.network, self.path, self.measured = network.eval(), path, 0
        call = Call.of(network)
        self.trace: Trace = trace(network, call, batch, weights(network))
        self.found = dense_pass(network, call, [batch], self.trace, Probes(blocks=True))

    def measure(self) -> DensePass:
        self.measured += 1
        return self.found

    def ask(self, parts: dict[str, str] = PARTS, own: bool = False) -> tuple[DensePass, str]:
        return cached_or_measured(self.path, parts, self.network, self.trace, self.measure, own=own)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    torch.manual_seed(0)
    return Case(Grouped(), {"input_ids": torch.arange(18).reshape(2, 9) % 9}, tmp_path / "m")


@pytest.mark.parametrize("name", ["encoder", "resnet", "grouped", "rows"])
def test_statistics_round_trip(
    tmp_path: Path, case: Case, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "rows":
        monkeypatch.setattr(moments_module, "_NARROW", 4)
        case = Case(nn.Sequential(nn.Linear(12, 6)), {"x": torch.randn(5, 12)}, tmp_path / "m")
        assert isinstance(case.found.moments["0.weight"].second, RowMoment)
    if name == "encoder":
        case = Case(encoder(2), texts(), tmp_path / "m")
    elif name == "resnet":
        case = Case(resnet20(), {"x": torch.randn(2, 3, 8, 8)}, tmp_path / "m")
    found, said = case.ask()
    again, read = case.ask()
    assert case.measured == 1 and found is case.found
    assert (said, read) == (f"kept in {case.path}", f"read from {case.path}")
    assert again.moments.keys() == found.moments.keys() and again.gradients.keys() == found.gradients.keys()
    for weight, moments in found.moments.items():
        other = again.moments[weight]
        assert other.rows == moments.rows
        for field in ("mean", "second", "dense_mean", "cross", "dense_second"):
            ours, theirs = getattr(other, field), getattr(moments, field)
            if name == "rows" and isinstance(theirs, RowMoment):
                assert torch.equal(ours.weights, theirs.weights)
                ours, theirs = ours.formed(), theirs.formed()
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride(), (weight, field)
    for one, second in ((found.gradients, again.gradients), (found.blocks, again.blocks)):
        assert one.keys() == second.keys()
        assert all(torch.equal(tensor, second[weight]) for weight, tensor in one.items())
    assert bool(found.blocks) == (name != "grouped")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_stores_shared_and_symmetric_parts_once(tmp_path: Path) -> None:
    case = Case(encoder(1), texts(), tmp_path / "m")
    again = (case.ask(), case.ask())[1][0]
    query, key = (f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key"))
    assert torch.equal(again.moments[query].second, again.moments[key].second)
    shapes = {name: info.shape for name, info in read_header(case.path).tensors.items()}
    assert f"second {key}" not in shapes and shapes[f"second {query}"] == (16 * 17 // 2,)
    assert "second embeddings.word_embeddings.weight" not in shapes


def test_memory_holds_half_of_a_symmetric_matrix() -> None:
    scratch, matrix = Scratch(), torch.rand(256, 256).double()
    kept = KeptTensors(scratch)
    kept.put("g", matrix + matrix.T)
    assert torch.equal(kept["g"], matrix + matrix.T)
    parts = scratch.get((id(kept), "g"))
    held = {panel.untyped_storage().data_ptr(): panel.untyped_storage().nbytes() for panel in parts}
    assert sum(held.values()) == scratch.nbytes < 0.65 * matrix.nbytes


def test_output_is_deterministic(case: Case) -> None:
    case.ask()
    first = case.path.read_bytes()
    case.path.unlink()
    case.ask()
    assert case.path.read_bytes() == first


def test_names_and_replaces_changed_parts(case: Case) -> None:
    case.ask()
    said = case.ask({"weights": "c", "data": "d"})[1]
    assert said == f"kept in {case.path}, which was of other weights, other data: measured again"
    assert case.ask({"weights": "c", "data": "d"})[1] == f"read from {case.path}"
    assert "of other weights:" in case.ask({"weights": "a", "data": "d"})[1]
    assert case.measured == 3


def test_names_a_changed_network(case: Case) -> None:
    for parts, said in (
        ({"network": "a", "data": "a"}, "kept in"),
        ({"network": "b", "data": "b"}, "of other data:"),
        ({"network": "c", "data": "b"}, "of other network:"),
    ):
        assert said in case.ask(parts)[1]


def forge(path: Path, **changed: Tensor | None) -> None:
    """Put other tensors in the file, with a digest that is right."""
    item = open_item(path)
    tensors = {name: t for name, t in (load_file(path) | changed).items() if t is not None}
    put_item(path, item.record, item.fingerprint, [Entry.of(name, t) for name, t in tensors.items()])


def test_rejects_damaged_files_and_keeps_them(case: Case) -> None:
    case.ask()
    whole = case.path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    damages = {
        "truncated": whole[:-8],
        "no header": whole[:5],
        "not those that were written": bytes(flipped),
        "belong to no tensor": whole + b"more",
        "not a safetensors file": b"\xff" * 64,
    }
    for why, data in damages.items():
        case.path.write_bytes(data)
        before = contents(case.path.parent)
        with pytest.raises(MpocError, match=f"(?s)^{case.path}: .*{why}"):
            case.ask()
        assert contents(case.path.parent) == before
    assert case.measured == 1
    for measured, data in enumerate(damages.values(), start=2):
        case.path.write_bytes(data)
        case.ask(own=True)
        assert case.measured == measured and case.path.read_bytes() == whole


def test_never_replaces_a_foreign_file(case: Case) -> None:
    save_file({"x": torch.ones(1)}, case.path)
    before = case.path.read_bytes()
    with pytest.raises(MpocError, match=f"^{case.path}: holds no intermediate results"):
        case.ask()
    assert case.path.read_bytes() == before and case.measured == 0


def test_never_replaces_another_item(case: Case) -> None:
    put_item(case.path, "a layer", PARTS)
    before = case.path.read_bytes()
    with pytest.raises(MpocError, match=f"^{case.path}: holds no moments"):
        case.ask()
    assert case.path.read_bytes() == before and case.measured == 0


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"mean last.weight": None}, "'mean last.weight' is not there"),
        ({"mean last.weight": torch.zeros(7, dtype=torch.float64)}, "of another shape"),
        ({"mean last.weight": torch.zeros(8)}, "or dtype"),
        ({"gradient last.weight": torch.zeros(3, 3, dtype=torch.float64)}, "of another shape"),
        ({"rows last.weight": torch.zeros(2, dtype=torch.int64)}, "of another shape"),
        (
            {"mean last.weight": torch.full((8,), torch.inf, dtype=torch.float64)},
            "values that are not finite",
        ),
        ({"block x": torch.zeros(3, dtype=torch.float64)}, "'block x' is not of this network"),
    ],
)
def test_rejects_forged_files(case: Case, changed: dict[str, Tensor | None], why: str) -> None:
    case.ask()
    forge(case.path, **changed)
    with pytest.raises(MpocError, match=f"^{case.path}: damaged: .*{why}"):
        case.ask()


def test_fingerprints() -> None:
    batches = [texts(), texts(seed=1)]

    def parts(network: nn.Module, batches: list[Batch], **options: int) -> dict[str, str]:
        return calibration_fingerprint(network, Call.of(network), batches, None, **options)

    def differ(other: dict[str, str]) -> set[str]:
        assert other.keys() == first.keys()
        return {part for part, digest in first.items() if digest != other[part]}

    first = parts(encoder(1), batches, seed=0)
    assert differ(parts(encoder(1), [texts(), texts(seed=1)], seed=0)) == set()
    assert differ(parts(encoder(1), batches, seed=1)) == {"options"}
    assert differ(parts(encoder(1), batches[:1], seed=0)) == {"data"}
    changed = encoder(1)
    changed.get_parameter("encoder.layer.0.output.dense.weight").data[0, 0] += 1e-3
    assert differ(parts(changed, batches, seed=0)) == {"weights", "network"}
    other = encoder(1)
    other.encoder.layer[0].attention.self.scaling *= 2  # no weight, and no word of what it prints
    assert differ(parts(other, batches, seed=0)) == {"network"}
