"""Every form, on every kind of layer, through everything that writes and reads compressed files.

A form is a row of ``ROWS``, and a cell is a form on a kind of layer. The command line compresses the
layer; the file is loaded, expanded, saved again, and made in memory. References are Eq. (5) and the sum of
both parts entry by entry, the recorded errors, and the dense network.
"""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpoc
import mpoc.hf  # registers
from mpoc.compression.expand import expand_checkpoint
from mpoc.errors import MpocError
from mpoc.io.coded_parts import fits_half
from mpoc.io.hub_directory import configured_layer
from mpoc.io.manifest import MANIFEST_FILE, LayerRecord
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.safetensors_header import read_header
from mpoc.tensor_networks.structure import Structure
from tests.nn.layers import NETWORKS, floats, named
from tests.support.checkpoints import relative_error
from tests.support.hub_models import answer, auto, compress_saved, tiny
from tests.support.marks import slow_except
from tests.support.process import Here
from tests.support.programs import assert_exports_alike
from tests.support.sums import compress_to_sums, low_rank_weight, sum_weight
from tests.support.weights import by_eq_5

KINDS = (
    "linear, padded",
    "conv2d with its strides",
    "embedding bag",
    "transposed conv1d",
    "lstm",
    "attention",
)
MAKERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **NETWORKS,
    "linear of 48 inputs": lambda: (named(nn.Linear(48, 64)), floats(5, 48)),
    "convolution of 8×8": lambda: (named(nn.Conv2d(3, 8, 3, stride=2, padding=1)), floats(5, 3, 8, 8)),
}
Reference = Callable[[Sequence[Tensor], Structure], Tensor]


@dataclass(frozen=True)
class Row:
    """A form: how it is asked for on a command line and in memory, and what is known of it."""

    form: str  # as reports name it
    words: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = KINDS
    bond: int = 3
    reference: Reference | None = None  # the weight of cores, by its definition
    random: bool = False  # cores drawn instead of fitted: the fit needs calibration
    goals: tuple[str, ...] = ("--bond", "--ratio", "--size", "--discard", "--max-error")


def of_form(form: str, **more: Any) -> Row:
    """Asked for by its name."""
    return Row(form, ("--form", form), {"form": form}, **more)


MAP = {"conv": "map", "input_shape": (1, 3, 8, 8)}
ORDERED: dict[str, Any] = {"kinds": ("linear of 48 inputs",)}
ROWS = {
    "mpo": of_form("mpo", reference=by_eq_5),
    "svd": of_form("svd", reference=low_rank_weight),
    "tree": of_form("tree"),
    "mera": of_form("mera", goals=("--bond", "--ratio", "--size")),
    "svd+mpo": Row("svd+mpo", reference=sum_weight, random=True, goals=()),
    "mpo, Morton order": Row("mpo", ("--order", "morton:3x4x4"), {"order": "morton:3x4x4"}, **ORDERED),
    "mpo, learned order": Row("mpo", ("--order", "learned"), {"order": "learned"}, **ORDERED),
    "mpo, whole map": Row(
        "mpo", ("--conv", "map", "--input-shape", "8x8:stride=2,padding=1"), MAP,
        kinds=("convolution of 8×8",), bond=10**6, goals=(),
    ),
}  # fmt: skip
CELLS = [(name, kind) for name, row in ROWS.items() for kind in row.kinds]
QUICK = [(name, kind) for name, kind in CELLS if kind not in KINDS[3:]]
GOALS = {"--bond": 6, "--ratio": 0.5, "--size": 14_000, "--discard": 0.3, "--max-error": 0.7}


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """How well a MERA is fitted is tested with its fit."""
    monkeypatch.setattr("mpoc.tensor_networks.fit.mera.MOST_STEPS", 20)


@dataclass(frozen=True)
class Cell:
    """A network compressed to a file, both in ``folder``."""

    row: Row
    network: nn.Module
    x: Tensor
    path: Path

    @property
    def replaced(self) -> list[LayerRecord]:
        return read_manifest(self.path).replaced

    def loaded(self) -> nn.Module:
        return mpoc.load(self.path, copy.deepcopy(self.network)).eval()


def make(here: Here, name: str, kind: str) -> Cell:
    """What ``mpoc compress`` makes of a layer of a kind."""
    torch.manual_seed(0)
    network, x = MAKERS[kind]()
    return compressed(here, ROWS[name], network.eval(), x)


def compressed(here: Here, row: Row, network: nn.Module, x: Tensor, *more: object) -> Cell:
    """To ``row.bond`` if ``more`` says nothing else."""
    torch.save(network.state_dict(), here.folder / "m.pt")
    path = here.folder / "m.mpo.safetensors"
    if row.random:
        compress_to_sums(here.folder / "m.pt", path, embeddings=True)
    else:
        words = more or ("--bond", row.bond, "--embeddings", "--allow-growth")
        done = here("compress", "m.pt", *row.words, *words, "-o", path, "--force", "--quiet")
        assert done.returncode == 0, done.stderr
    return Cell(row, network, x, path)


@pytest.mark.parametrize(("name", "kind"), slow_except(CELLS, *QUICK))
class TestEveryCell:
    def test_load_and_expand_agree(self, here: Here, name: str, kind: str) -> None:
        cell = make(here, name, kind)
        stored, loaded = load_file(cell.path), cell.loaded()
        state = loaded.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], value) for key, value in stored.items())
        done = here("expand", cell.path, "-o", "dense.safetensors")
        assert done.returncode == 0, done.stderr
        dense = load_file(here.folder / "dense.safetensors")
        assert {layer.form for layer in cell.replaced} == {cell.row.form}
        for layer in cell.replaced:
            cores = [stored[core] for core in layer.core_names]
            assert layer.num_stored == sum(core.numel() for core in cores)
            assert [core.shape for core in cores] == layer.core_shapes
            if cell.row.reference is not None:
                expected = cell.row.reference(cores, layer.structure).float()
                torch.testing.assert_close(dense[layer.name], expected, rtol=1e-5, atol=1e-5)
            if not cell.row.random:
                error = relative_error(cell.network.state_dict()[layer.name], dense[layer.name])
                assert layer.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)
        cell.network.load_state_dict(dense, strict=True)
        torch.testing.assert_close(loaded(cell.x), cell.network(cell.x), rtol=1e-4, atol=1e-4)

    def test_saving_again_gives_the_same_file(self, here: Here, name: str, kind: str) -> None:
        cell = make(here, name, kind)
        mpoc.save(cell.loaded(), "again.safetensors")
        assert same_tensors(cell.path, Path("again.safetensors"))
        again = read_manifest(Path("again.safetensors")).replaced
        # torch lists the weights of an attention layer in another order once they are cores.
        assert sorted(again, key=lambda layer: layer.name) == sorted(
            cell.replaced, key=lambda layer: layer.name
        )

    def test_in_memory_matches_the_command(self, here: Here, name: str, kind: str) -> None:
        row = ROWS[name]
        if row.random:
            pytest.skip("needs calibration")
        cell = make(here, name, kind)
        loaded = cell.loaded()
        report = mpoc.compress(cell.network, bond=row.bond, embeddings=True, allow_growth=True, **row.options)
        assert [told(layer) for layer in report.layers] == [told(layer) for layer in cell.replaced]
        torch.testing.assert_close(cell.network(cell.x), loaded(cell.x), rtol=0, atol=0)
        mpoc.save(cell.network, "memory.safetensors")
        assert same_tensors(cell.path, Path("memory.safetensors"))


def told(layer: LayerRecord) -> tuple[object, ...]:
    """What a record says of a layer's cores."""
    return layer.name, layer.form, layer.core_shapes, layer.order, layer.relative_error, layer.entropies


def same_tensors(one: Path, other: Path) -> bool:
    """The same names and values, in any order."""
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def small() -> nn.Sequential:
    """48 → 64 → 32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.mark.parametrize(("name", "goal"), [(name, goal) for name, row in ROWS.items() for goal in row.goals])
def test_meets_every_goal(here: Here, name: str, goal: str) -> None:
    row, amount = ROWS[name], GOALS[goal]
    torch.save(small().state_dict(), "m.pt")
    plan = here("compress", "m.pt", *row.words, goal, amount, "--dry-run", "--json", "--quiet")
    assert plan.returncode == 0, plan.stderr
    cell = compressed(here, row, small(), floats(5, 48), goal, amount)
    manifest, nbytes = read_manifest(cell.path), cell.path.stat().st_size
    assert json.loads(plan.stdout)["totals"]["bytes_after"] >= nbytes
    assert {layer.form for layer in manifest.replaced} == {row.form}
    assert manifest.rho_selected <= (amount if goal == "--ratio" else 1)
    assert nbytes <= (amount if goal == "--size" else 10**6)
    for layer in manifest.replaced:
        assert layer.relative_error is not None
        assert layer.relative_error <= (amount if goal == "--max-error" else 1)
        assert goal != "--bond" or max(layer.bonds) <= amount
    expand_checkpoint(cell.path, here.folder / "dense.safetensors")
    cell.network.load_state_dict(load_file(here.folder / "dense.safetensors"))
    torch.testing.assert_close(cell.loaded()(cell.x), cell.network(cell.x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mpo", "svd", "tree", "mera"])
def test_output_is_deterministic_in_the_requested_dtype(here: Here, name: str) -> None:
    words = ("--bond", 4, "--dtype", "bfloat16")
    first = compressed(here, ROWS[name], small(), floats(5, 48), *words).path.read_bytes()
    cell = compressed(here, ROWS[name], small(), floats(5, 48), *words)
    assert cell.path.read_bytes() == first
    stored = load_file(cell.path)
    assert {stored[core].dtype for layer in cell.replaced for core in layer.core_names} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["svd", "tree", "mera"])
def test_recipe_sets_the_form_of_a_layer(here: Here, name: str) -> None:
    Path("r.toml").write_text(f'bond = 3\n[layer."0"]\nform = "{name}"\n')
    torch.save(small().state_dict(), "m.pt")
    assert here("compress", "m.pt", "--recipe", "r.toml", "-o", "o.safetensors").returncode == 0
    assert [layer.form for layer in read_manifest(Path("o.safetensors")).layers] == [name, "mpo"]


@pytest.mark.parametrize("name", ROWS)
def test_report_tells_form_and_bonds(here: Here, name: str) -> None:
    cell = make(here, name, ROWS[name].kinds[0])
    row = json.loads(here("report", cell.path, "--json").stdout)["layers"][0]
    line = next(csv.DictReader(io.StringIO(here("report", cell.path, "--csv").stdout)))
    layer, form = cell.replaced[0], cell.row.form
    assert (row["form"], tuple(row["bonds"]), row["low_rank"]) == (form, layer.bonds, layer.low_rank)
    assert (line["form"], line["bonds"]) == (form, "×".join(map(str, layer.bonds)))
    table = here("report", cell.path).stdout
    assert re.search(rf" {layer.num_original:,} → +{layer.num_stored:,} ", table)
    assert not layer.low_rank or f"+ r {layer.low_rank} " in table


@pytest.mark.parametrize("change", ["missing", "another rank", "transposed", "another dtype"])
@pytest.mark.parametrize("name", ["mpo", "tree", "mera", "svd+mpo"])
def test_rejects_cores_that_contradict_the_manifest(here: Here, name: str, change: str) -> None:
    cell = make(here, name, "linear, padded")
    tensors, metadata = load_file(cell.path), read_header(cell.path).metadata
    core = cell.replaced[0].core_names[-1]
    last = tensors.pop(core)
    wrong = {"another rank": last[:1], "another dtype": last.half()}
    wrong["transposed"] = last.transpose(0, -1).contiguous()
    if change in wrong and wrong[change].shape == last.shape and change != "another dtype":
        pytest.skip("this core has the same shape both ways")
    save_file(tensors | ({core: wrong[change]} if change in wrong else {}), cell.path, metadata)
    for read in (cell.loaded, lambda: expand_checkpoint(cell.path, Path("dense.safetensors"))):
        with pytest.raises(MpocError, match=rf"m\.mpo\.safetensors: .*'{core}'"):
            read()
    assert not Path("dense.safetensors").exists()


@pytest.mark.parametrize("name", ROWS)
def test_trained_cores_keep_the_form(here: Here, name: str) -> None:
    cell = make(here, name, ROWS[name].kinds[0])
    model = cell.loaded().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(cell.x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    cores = [core for layer in cell.replaced for core in layer.core_names]
    assert not any(torch.equal(before[core], model.state_dict()[core]) for core in cores)
    mpoc.save(model, "tuned.safetensors")
    for old, new in zip(cell.replaced, read_manifest(Path("tuned.safetensors")).replaced, strict=True):
        assert (new.form, new.core_shapes, new.low_rank) == (old.form, old.core_shapes, old.low_rank)
        assert new.relative_error is None
    assert torch.equal(mpoc.load("tuned.safetensors", cell.network)(cell.x), model(cell.x))


def exported() -> nn.Module:
    """24 → 48 → 12."""
    layers = OrderedDict(layer=nn.Linear(24, 48), act=nn.ReLU(), head=nn.Linear(48, 12))
    return nn.Sequential(layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svd", "tree", "mera", "svd+mpo"])
def test_exported_program_computes_the_same(here: Here, name: str) -> None:
    cell = compressed(here, ROWS[name], exported(), floats(5, 24))
    assert_exports_alike(cell.path, exported, here.folder)


@dataclass(frozen=True)
class Directory:
    """A tiny model of transformers, compressed to a form, and expanded again."""

    path: Path
    expanded: Path


Make = Callable[[str, str], Directory]
HUB = [(name, kind) for name in ("svd", "tree", "mera", "svd+mpo") for kind in ("bert", "gpt2", "mixtral")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``directory("tree", "gpt2")``, each made only once."""

    @cache
    def made(name: str, kind: str) -> Directory:
        folder = tmp_path_factory.mktemp(kind)
        tiny(kind).save_pretrained(folder / "original")
        if ROWS[name].random:
            compress_to_sums(folder / "original", folder / "compressed", embeddings=True)
        else:
            compress_saved(folder, bond=3, embeddings=True, **ROWS[name].options)
        expand_checkpoint(folder / "compressed", folder / "dense")
        return Directory(folder / "compressed", folder / "dense")

    return made


@pytest.mark.parametrize(("name", "kind"), slow_except(HUB, ("svd+mpo", "gpt2")))
class TestTransformers:
    """gpt2 stores weights transposed and ties its head; mixtral holds experts."""

    def test_from_pretrained_computes_the_same(self, directory: Make, name: str, kind: str) -> None:
        small = directory(name, kind)
        model = auto(kind, small.path)
        torch.testing.assert_close(answer(model), answer(auto(kind, small.expanded)), rtol=1e-4, atol=1e-4)
        model.train()
        model(input_ids=torch.arange(2, 18).reshape(2, 8))[0].square().sum().backward()
        cores = {key: value for key, value in model.named_parameters() if "cores." in key}
        assert cores and [key for key, core in cores.items() if core.grad is None] == []

    def test_save_pretrained_keeps_the_form(
        self, directory: Make, tmp_path: Path, name: str, kind: str
    ) -> None:
        small = directory(name, kind)
        model = auto(kind, small.path)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / MANIFEST_FILE).exists()
        before, after = (
            {layer.name: (layer.form, layer.core_shapes) for layer in read_manifest(path).replaced}
            for path in (small.path, tmp_path)
        )
        assert before == after != {}
        assert torch.equal(answer(auto(kind, tmp_path)), answer(model))

    def test_config_and_card_describe_the_form(self, directory: Make, name: str, kind: str) -> None:
        folder = directory(name, kind).path
        layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
        record = read_manifest(folder).replaced[0]
        entry = layers[record.name]
        assert entry["form"] == ROWS[name].form
        found = configured_layer(record.name, entry)
        assert (found.structure, found.core_shapes) == (record.structure, record.core_shapes)
        inner = ", ".join(map(str, record.bonds)).removeprefix("1, ").removesuffix(", 1")
        assert f"| {inner} " in (folder / "README.md").read_text()
        wrong: list[dict[str, Any]] = [
            {"form": "tree" if name == "mera" else "mera"},
            {"bonds": [*record.bonds, 2]},
        ]
        wrong += [{"low_rank": rank} for rank in (10**9, -1, "2")]
        for change in wrong:
            with pytest.raises(MpocError, match=r"config\.json: damaged quantization_config"):
                configured_layer(record.name, entry | change)


# How numbers are stored: options in memory, whose words are those of the command line.
STORED: dict[str, dict[str, Any]] = {
    "dense, grid": {"bits": 4},
    "dense, coded": {"bits": 3, "storage": "coded"},
    "mpo, grid": {"bond": 3, "bits": 8},
    "svd, coded": {"bond": 3, "bits": 6, "storage": "coded", "form": "svd"},
    "tree, coded": {"bond": 3, "bits": 8, "storage": "coded", "form": "tree"},
    "mera, grid": {"bond": 2, "bits": 6, "form": "mera"},
}
STORED_CELLS = [(name, kind) for name in STORED for kind in KINDS]
STORED_QUICK = [("dense, grid", KINDS[1]), ("dense, coded", KINDS[0]), ("mpo, grid", KINDS[0])]
STORED_QUICK += [("svd, coded", KINDS[2]), ("dense, grid", KINDS[4])]


def words(options: dict[str, Any]) -> tuple[object, ...]:
    """Options of the command line."""
    return tuple(word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value))


def stored_cell(here: Here, name: str, kind: str) -> Cell:
    """What ``mpoc compress`` makes of a layer of a kind, in few bits."""
    torch.manual_seed(0)
    network, x = MAKERS[kind]()
    options = (*words(STORED[name]), "--embeddings", "--allow-growth")
    return compressed(here, Row(name.partition(",")[0]), network.eval(), x, *options)


@pytest.mark.parametrize(("name", "kind"), slow_except(STORED_CELLS, *STORED_QUICK))
class TestEveryStorage:
    def test_every_reader_gets_the_same_numbers(self, here: Here, name: str, kind: str) -> None:
        cell = stored_cell(here, name, kind)
        stored, manifest = load_file(cell.path), read_manifest(cell.path)
        expand_checkpoint(cell.path, here.folder / "dense.safetensors")
        dense = load_file(here.folder / "dense.safetensors")
        assert {layer.form for layer in manifest.changed} == {cell.row.form}
        for layer in manifest.changed:
            assert layer.nbytes == sum(stored[key].nbytes for key in layer.file_names)
            error = relative_error(cell.network.state_dict()[layer.name], dense[layer.name])
            assert layer.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)
        for vector, tensor in cell.network.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                assert (stored[vector].dtype, dense[vector].dtype) == (torch.float16, torch.float32)
                assert torch.equal(dense[vector], tensor.half().float())
        loaded = cell.loaded()
        cell.network.load_state_dict(dense, strict=True)
        torch.testing.assert_close(loaded(cell.x), cell.network(cell.x), rtol=1e-4, atol=1e-4)

    def test_saving_again_gives_the_same_file(self, here: Here, name: str, kind: str) -> None:
        cell = stored_cell(here, name, kind)
        mpoc.save(cell.loaded(), "again.safetensors")
        assert same_tensors(cell.path, Path("again.safetensors"))
        again = {layer.name: layer for layer in read_manifest(Path("again.safetensors")).layers}
        assert again == {layer.name: layer for layer in read_manifest(cell.path).layers}

    def test_in_memory_matches_the_command(self, here: Here, name: str, kind: str) -> None:
        cell = stored_cell(here, name, kind)
        loaded = cell.loaded()
        report = mpoc.compress(cell.network, embeddings=True, allow_growth=True, **STORED[name])
        found, expected = report.layers, read_manifest(cell.path).layers
        for one, other in zip(found, expected, strict=True):
            assert (one.form, one.storage, one.nbytes) == (other.form, other.storage, other.nbytes)
            assert one.relative_error == other.relative_error
        torch.testing.assert_close(cell.network(cell.x), loaded(cell.x), rtol=0, atol=0)
        mpoc.save(cell.network, "memory.safetensors")
        assert same_tensors(cell.path, Path("memory.safetensors"))


def test_grid_of_a_weight_follows_from_its_definition(here: Here) -> None:
    cell = stored_cell(here, "dense, grid", "linear, padded")
    stored, (layer,) = load_file(cell.path), read_manifest(cell.path).layers
    rows, columns = layer.shape
    grid = layer.storage[0]
    group = grid["group"] or columns
    packed, scale, zeros = (stored[f"{layer.name}_{end}"] for end in ("packed", "scale", "zero_point"))
    assert stored[f"{layer.name}_shape"].tolist() == [rows, columns]
    expected = torch.empty(rows, columns)
    for i, j in itertools.product(range(rows), range(columns)):
        code = int(packed[i, j // 8]) >> 4 * (j % 8) & 15
        zero = int(zeros[i // 8, j // group]) >> 4 * (i % 8) & 15
        expected[i, j] = (code - zero) * float(scale[i, j // group])
    assert torch.equal(cell.loaded().state_dict()[layer.name], expected)


@pytest.mark.parametrize("name", STORED)
def test_trained_layers_keep_their_storage(here: Here, name: str) -> None:
    cell = stored_cell(here, name, "linear, padded")
    model = cell.loaded().train()
    model(cell.x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    mpoc.save(model, "tuned.safetensors")
    (old,), (new,) = (read_manifest(path).layers for path in (cell.path, Path("tuned.safetensors")))
    assert (new.form, new.storage, new.relative_error) == (old.form, old.storage, None)
    assert new.nbytes == pytest.approx(old.nbytes, rel=0.1)
    with torch.no_grad():
        tuned = mpoc.load("tuned.safetensors", cell.network)(cell.x)
        assert relative_error(model(cell.x), tuned) < 0.2


@pytest.mark.parametrize(
    ("name", "values", "fits"),
    [
        ("norm.weight", [1.0, -0.3, 65504.0], True),
        ("norm.weight", [1.0, 65536.0], False),
        ("fc.bias", [0.1, 1e-9], True),
        ("fc.bias", [1e-9, 1e-7], False),
        ("fc.bias", [0.0, 0.0], True),
        ("fc.bias", [0.1, float("nan")], False),
        ("bn.running_mean", [1.0, 3e-5], True),
        ("bn.running_var", [1.0, 3e-4], True),
        ("bn.running_var", [1.0, 3e-6], False),
        ("rotary.inv_freq", [1.0, 0.5], False),
        ("fc.weight", [[1.0, 0.5]], False),
    ],
)
def test_halves_vectors_only_where_that_is_harmless(name: str, values: list[Any], fits: bool) -> None:
    assert fits_half(name, torch.tensor(values)) == fits
    assert not fits_half(name, torch.tensor(values).double())


@pytest.mark.parametrize(("options", "halved"), [({}, "float32"), ({"dtype": "float32"}, "")])
def test_a_dtype_or_halves_of_its_own_keep_a_file_from_halving(
    tmp_path: Path, options: dict[str, Any], halved: str
) -> None:
    state = {"fc.weight": torch.randn(48, 64), "fc.bias": torch.randn(48), "rotary.inv_freq": torch.rand(8)}
    recipe = mpoc.Recipe(bits=4, **options)
    for number, more in enumerate(({}, {"old.bias": torch.randn(4).half()})):
        torch.save(state | more, tmp_path / "m.pt")
        output = tmp_path / f"{number}.safetensors"
        done = mpoc.compress_checkpoint(tmp_path / "m.pt", output, recipe)
        planned = mpoc.compress_checkpoint(tmp_path / "m.pt", output, recipe, dry_run=True)
        assert planned.nbytes - 24 <= done.nbytes <= planned.nbytes
        assert read_manifest(output).halved == ("" if more else halved)
        stored = load_file(output)
        assert stored["rotary.inv_freq"].dtype == torch.float32
        assert (stored["fc.bias"].dtype == torch.float16) == (halved != "" and not more)


def test_finetuned_and_half_networks_keep_the_dtypes_of_their_vectors(here: Here) -> None:
    cell = stored_cell(here, "dense, grid", "linear, padded")
    mpoc.save(cell.loaded().half(), "half.safetensors")
    assert read_manifest(Path("half.safetensors")).halved == ""
    assert mpoc.load("half.safetensors", copy.deepcopy(cell.network).half()).state_dict()
    model = cell.loaded()
    with torch.no_grad():
        model.get_parameter("layer.bias").add_(1e-5)
    mpoc.save(model, "tuned.safetensors")
    again = mpoc.load("tuned.safetensors", cell.network)
    assert torch.equal(again.get_parameter("layer.bias"), model.get_parameter("layer.bias"))


DAMAGE: dict[str, tuple[str, Callable[[Tensor], Tensor | None]]] = {
    "packed missing": ("_packed", lambda codes: None),
    "packed cut short": ("_packed", lambda codes: codes[:, :-1].contiguous()),
    "packed too long": ("_packed", lambda codes: torch.cat([codes, codes])),
    "packed as bytes": ("_packed", lambda codes: codes.view(torch.int8)),
    "scale of NaN": ("_scale", lambda scale: scale.fill_(float("nan"))),
    "negative scale": ("_scale", lambda scale: -scale),
    "another shape": ("_shape", lambda shape: shape.flip(0)),
    "coded missing": ("_coded", lambda stream: None),
    "coded cut short": ("_coded", lambda stream: stream[:-3].clone()),
    "coded too long": ("_coded", lambda stream: torch.cat([stream, stream[:1]])),
    "coded as a matrix": ("_coded", lambda stream: stream[None]),
    "coded of zeros": ("_coded", torch.zeros_like),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_rejects_damaged_codes(here: Here, damage: str) -> None:
    ending, change = DAMAGE[damage]
    cell = stored_cell(here, "dense, coded" if ending == "_coded" else "dense, grid", "linear, padded")
    tensors, metadata = load_file(cell.path), read_header(cell.path).metadata
    name = next(name for name in tensors if name.endswith(ending))
    new = change(tensors.pop(name))
    save_file(tensors | ({} if new is None else {name: new}), cell.path, metadata)
    done = here("expand", cell.path, "-o", "dense.safetensors")
    assert done.returncode == 1
    assert re.match(rf"error: .*m\.mpo\.safetensors: .*tensor '{name.partition('_')[0]}", done.stderr)
    assert len(done.stderr.splitlines()) <= 2
    assert not Path("dense.safetensors").exists()
    with pytest.raises(MpocError, match=r"m\.mpo\.safetensors"):
        cell.loaded()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nbytes": 1}, "bytes of storage"),
        ({"nbytes": None}, "bytes of storage"),
        ({"storage": []}, "bytes of storage"),
        ({"storage": [{"kind": "grid", "bits": 7, "group": None, "symmetric": False}]}, "bits"),
        ({"storage": [{"kind": "grid", "bits": 4, "group": 7, "symmetric": False}]}, "does not divide"),
        ({"storage": [{"kind": "ring"}]}, "storage"),
        ({"storage": [{"kind": "coded"}] * 2}, "zip"),
    ],
)
def test_rejects_storage_that_contradicts_the_record(here: Here, change: dict[str, Any], said: str) -> None:
    cell = stored_cell(here, "dense, grid", "linear, padded")
    tensors, metadata = load_file(cell.path), dict(read_header(cell.path).metadata)
    value = json.loads(metadata["mpoc"])
    value["layers"][0] |= change
    save_file(tensors, cell.path, metadata | {"mpoc": json.dumps(value)})
    with pytest.raises(MpocError, match=said):
        read_manifest(cell.path)


STORED_HUB = [(name, kind) for name in STORED for kind in ("bert", "gpt2", "mixtral")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), STORED_HUB)
def test_transformers_decodes_while_loading(tmp_path: Path, name: str, kind: str) -> None:
    tiny(kind).save_pretrained(tmp_path / "original")
    compress_saved(tmp_path, embeddings=True, **STORED[name])
    expand_checkpoint(tmp_path / "compressed", tmp_path / "dense")
    model = auto(kind, tmp_path / "compressed")
    torch.testing.assert_close(answer(model), answer(auto(kind, tmp_path / "dense")), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(answer(auto(kind, tmp_path / "again")), answer(model))
