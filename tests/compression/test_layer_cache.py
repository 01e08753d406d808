from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpoc.compression.plain_fit import Fitted, fit_layer
from mpoc.compression.plan import make_plan
from mpoc.compression.recipe import Recipe
from mpoc.compression.resume import LayerCache, in_order_key
from mpoc.compression.selection import LinearMap, Selection
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.manifest import LayerRecord
from mpoc.io.safetensors_header import TensorInfo
from mpoc.io.safetensors_writer import write_safetensors
from tests.support.checkpoints import contents


def fitted(dtype: torch.dtype = torch.float32) -> Fitted:
    """A layer of two cores, with a bias that changed."""
    name = "fc.weight"
    weight = torch.randn(24, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    info = TensorInfo(name, str(dtype).removeprefix("torch."), (24, 30))
    checkpoint = Checkpoint(Path("m"), {name: info}, {}, lambda _: weight, {name: Path("m")})
    selection = Selection([LinearMap(name, "linear", (24, 30), info.dtype, False)], {}, "names", [])
    recipe = Recipe(bond=3, form="mpo", sites=2)
    found = fit_layer(checkpoint, make_plan(selection, recipe)[0], recipe, torch.device("cpu"))
    return Fitted(
        found.record, found.cores, {"fc.bias": torch.arange(24.0).to(dtype)}, {"block": (0.5, 0.25)}
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = fitted(dtype)
    store = LayerCache(tmp_path)
    store.keep(7, layer, 1.5)
    assert (store.count(), LayerCache(tmp_path).takes_up(6)) == (1, False)
    found = store.layer(7)
    assert (found.record, found.seconds) == (layer.record, 1.5)
    assert list(found.entries) == ["fc.bias", "fc.weight"]
    cores = found.entries["fc.weight"]
    assert [entry.info.name for entry in cores] == layer.record.core_names
    for entry, core in zip(cores, layer.cores, strict=True):
        assert torch.equal(entry.read(), core)
    (bias,) = found.entries["fc.bias"]
    assert torch.equal(bias.read(), layer.changed["fc.bias"])
    again = store.fitted(7)
    assert (again.record, again.losses) == (layer.record, layer.losses)
    assert all(map(torch.equal, again.cores, layer.cores))
    assert torch.equal(again.changed["fc.bias"], layer.changed["fc.bias"])


def test_dense_layer_stores_only_a_record(tmp_path: Path) -> None:
    record = LayerRecord("fc.weight", "linear", (24, 30), "float32", "dense", 720, 720, "float32", "small")
    store = LayerCache(tmp_path)
    store.keep(0, Fitted(record))
    assert store.layer(0).record == record
    assert store.layer(0).entries == {}


def test_stores_tensors_outside_layers(tmp_path: Path) -> None:
    store = LayerCache(tmp_path)
    store.keep_others({"bn.running_mean": torch.arange(3.0)})
    assert store.count() == 0
    assert torch.equal(store.others()["bn.running_mean"][0].read(), torch.arange(3.0))


def test_reuses_a_layer_with_the_same_key(tmp_path: Path) -> None:
    layer = fitted()
    LayerCache(tmp_path, lambda number: f"key {number}").keep(3, layer)
    assert LayerCache(tmp_path, lambda number: f"key {number}").takes_up(3)
    assert not LayerCache(tmp_path, lambda number: f"key {number}").takes_up(2)
    assert list(contents(tmp_path)) == ["000003.safetensors"]
    assert not LayerCache(tmp_path, lambda number: "another").takes_up(3)
    assert list(contents(tmp_path)) == []  # what is made anew does not count as finished


@pytest.mark.parametrize("position", [3, 200, -1, -60])
def test_ignores_a_damaged_layer(tmp_path: Path, position: int) -> None:
    store = LayerCache(tmp_path, str)
    store.keep(0, fitted())
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert not store.takes_up(0)
    path.write_bytes(data[:-5])
    assert not store.takes_up(0)


def test_clears_stale_files(tmp_path: Path) -> None:
    store = LayerCache(tmp_path, str)
    for number in (0, 1, 5):
        store.keep(number, fitted())
    (tmp_path / ".000001.safetensors.x.partial").mkdir()  # of a killed process
    store.clear(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.safetensors", "000001.safetensors"]


def test_failed_write_keeps_the_old_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, layer = LayerCache(tmp_path, str), fitted()
    store.keep(0, layer)

    def half(path: Path, *rest: object, **options: object) -> None:
        write_safetensors(path, [], {})
        raise OSError(28, "full")

    monkeypatch.setattr("mpoc.io.keyed_store.write_safetensors", half)
    with pytest.raises(OSError, match="full"):
        store.keep(0, Fitted(layer.record))
    assert store.takes_up(0)
    assert store.count() == 1


def test_key_depends_on_the_weight() -> None:
    """Which the network that data run through may lack."""
    keys = set()
    for seed in (0, 1):
        weight = torch.randn(24, 30, generator=torch.Generator().manual_seed(seed))
        info = TensorInfo("fc.weight", "float32", (24, 30))
        files = {"fc.weight": Path("m")}
        read = {"fc.weight": weight}.__getitem__
        checkpoint = Checkpoint(Path("m"), {"fc.weight": info}, {}, read, files)
        chosen = [LinearMap("fc.weight", "linear", (24, 30), "float32", False)]
        recipe = Recipe(bond=3)
        plans = make_plan(Selection(chosen, {}, "names", []), recipe)
        keys |= {in_order_key({"weights": "w"}, checkpoint, plans, recipe, number) for number in (0, None)}
        keys.add(in_order_key({"weights": "other"}, checkpoint, plans, recipe, 0))
    assert len(keys) == 5  # what layers share does not hang on one of them
