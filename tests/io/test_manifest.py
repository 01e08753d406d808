"""The manifest: there and back, its sums, and damaged ones."""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mpoc import __version__
from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest import FORMAT, LayerRecord, Manifest, Source, core_prefix
from mpoc.io.manifest_reader import parse_manifest, read_manifest
from mpoc.tensor_networks.structure import make_structure

SOME = settings(max_examples=60, deadline=None, derandomize=True)
HERE = Path("m.safetensors")


def record(name: str, kind: str, shape: tuple[int, ...], bond: int | None, **changes: Any) -> LayerRecord:
    """As a fit would leave it; dense where ``bond`` is None."""
    transposed = changes.pop("transposed", False)
    structure = make_structure(kind, shape, transposed)
    count = structure.num_original
    if bond is None:
        return LayerRecord(name, kind, shape, "float32", "dense", count, count, "float32", "too small")
    bonds = structure.bonds(bond)
    values: dict[str, Any] = {
        "transposed": transposed,
        "output_factors": structure.output_factors,
        "input_factors": structure.input_factors,
        "bonds": bonds,
        "padding": structure.padding,
        "relative_error": 0.25,
        "entropies": (0.5,) * (len(bonds) - 2),
        "entropies_of_weight": (None, 1.5, None)[: len(bonds) - 2],
        "spectra_of_weight": (((1, 0.8), (4, 0.3), (9, 0.0)), None, None, None)[: len(bonds) - 2],
    }
    low_rank = changes.get("low_rank", 0)
    whole = structure.as_form("svd+mpo") if low_rank else structure
    stored = whole.num_parameters(bond, low_rank)
    return LayerRecord(
        name, kind, shape, "float32", whole.form, count, stored, "bfloat16", "", **(values | changes)
    )


def manifest(*layers: LayerRecord, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "source": Source("modèle.pt", 123_456, 60_000, "ab" * 32),
        "layers": layers,
        "options": {"bond": 4, "seed": 0},
        "kinds_from": "names and shapes",
        "left_alone": {"wte.weight": "embedding (--embeddings includes it)"},
        "vectors": 7,
        "tied": {"lm_head.weight": "wte.weight"},
        "tool": "mpoc 0.1.0",
        "architecture": {"zoo": "resnet:depth=20"},
    }
    return Manifest(**(values | changes))


LAYERS = (
    record("conv.weight", "conv2d", (16, 12, 3, 3), 4),
    record("fc.weight", "linear", (64, 48), 3, transposed=True),
    record("embedding.weight", "embedding", (101, 32), 2),
    record("experts.gate_up_proj", "experts", (3, 16, 8), 2),
    record("sum.weight", "conv2d", (16, 12, 3, 3), 4, low_rank=5),
    record("head.weight", "linear", (3, 2), None),
)
WHOLE = manifest(*LAYERS)


def test_manifest_round_trip() -> None:
    assert parse_manifest(WHOLE.to_json(), HERE) == WHOLE
    assert parse_manifest(WHOLE.to_json(indent=2).encode(), HERE) == WHOLE
    assert parse_manifest(manifest().to_json(), HERE) == manifest()


_FLOATS = st.floats(0, 1e6)


@pytest.mark.slow
@SOME
@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.floats(0, 1) | st.none(),
    st.lists(_FLOATS, max_size=4).map(tuple),
    st.lists(_FLOATS | st.none(), max_size=4).map(tuple),
    st.text(max_size=5),
)
def test_any_record_round_trips(
    name: str, error: float | None, entropies: tuple[float, ...], of_weight: tuple[Any, ...], reason: str
) -> None:
    layer = record(
        name, "linear", (8, 12), 2, relative_error=error, entropies=entropies, entropies_of_weight=of_weight
    )
    whole = manifest(layer, left_alone={name: reason}, tied={f"{reason}{name}+": name})
    assert parse_manifest(whole.to_json(), HERE) == whole


def test_omits_default_values() -> None:
    text = manifest(LAYERS[-1]).to_json()
    (layer,) = json.loads(text)["layers"]
    assert set(layer) == {
        *("name", "kind", "shape", "dtype", "form"),
        *("num_original", "num_stored", "stored_dtype", "reason"),
    }
    (read,) = parse_manifest(text, HERE).layers
    assert (read.transposed, read.padding, read.relative_error) == (False, (0, 0), None)
    assert read.output_factors == read.input_factors == read.bonds == read.entropies == ()


def test_text_is_compact_and_versioned() -> None:
    text = WHOLE.to_json()
    assert text.startswith('{"format":2,"source":{"name":"modèle.pt","nbytes":')
    indented = WHOLE.to_json(indent=2)
    assert indented.startswith('{\n  "format": 2,\n')
    assert '"shape": [ 16, 12, 3, 3 ],\n' in indented
    assert "[ [ 1, 0.8 ], [ 4, 0.3 ], [ 9, 0.0 ] ],\n" in indented
    odd = manifest(LAYERS[0], left_alone={"a": "[\n  1,  2\n]"})
    assert parse_manifest(odd.to_json(indent=2), HERE) == odd


def test_text_is_deterministic() -> None:
    again = parse_manifest(WHOLE.to_json(), HERE)
    assert again.to_json() == WHOLE.to_json() == deepcopy(WHOLE).to_json()


def test_totals_match_hand_computed_sums() -> None:
    layers = (
        LayerRecord("a.weight", "linear", (10, 10), "float32", "mpo", 100, 30, "float32"),
        LayerRecord("b.weight", "linear", (30, 10), "float32", "mpo", 300, 50, "float32"),
        LayerRecord("c.weight", "linear", (10, 20), "float32", "dense", 200, 200, "float32"),
    )
    whole = manifest(*layers, source=Source("m.pt", 1, 1000, ""))
    assert [layer.layer for layer in whole.replaced] == ["a", "b"]
    assert whole.rho == (30 + 50) / (100 + 300)
    assert whole.rho_selected == (30 + 50 + 200) / (100 + 300 + 200)
    assert whole.num_parameters == 1000 - (100 - 30) - (300 - 50)
    assert layers[0].rho == 0.3
    assert manifest(layers[2]).rho == manifest().rho == manifest().rho_selected == 1.0


@pytest.mark.parametrize("layer", LAYERS[:-1], ids=lambda layer: layer.kind)
def test_record_restores_its_structure(layer: LayerRecord) -> None:
    structure = make_structure(layer.kind, layer.shape, layer.transposed)
    assert layer.structure == structure.as_form(layer.form)
    assert layer.structure.padding == layer.padding


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("fc.weight", "fc.cores"),
        ("weight", "cores"),
        ("lstm.weight_ih_l0", "lstm.weight_ih_l0_cores"),
        ("mlp.experts.down_proj", "mlp.experts.down_proj_cores"),
        ("attn.in_proj_weight", "attn.in_proj_weight_cores"),
    ],
)
def test_names_cores(name: str, prefix: str) -> None:
    assert core_prefix(name) == prefix
    assert record(name, "linear", (8, 8), 2).core_name(2) == f"{prefix}.2"


def test_reads_files_and_directories(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2)}, file, {"format": "pt", "mpoc": WHOLE.to_json()})
    (tmp_path / "mpoc.json").write_text(WHOLE.to_json(indent=2), "utf-8")
    assert read_manifest(file) == read_manifest(tmp_path) == WHOLE


def test_rejects_uncompressed_files(tmp_path: Path) -> None:
    plain, other = tmp_path / "plain.safetensors", tmp_path / "model.pt"
    save_file({"a": torch.zeros(2)}, plain)
    other.write_bytes(b"PK")
    for path in (plain, other, tmp_path):
        with pytest.raises(MpocError, match="not compressed by mpoc") as caught:
            read_manifest(path)
        assert caught.value.hint == "mpoc compress MODEL makes one that is"
    with pytest.raises(UsageError, match="no such file"):
        read_manifest(tmp_path / "absent")


def test_later_format_says_how_to_upgrade() -> None:
    value = json.loads(WHOLE.to_json()) | {"format": FORMAT + 1}
    with pytest.raises(
        MpocError, match=f"format {FORMAT + 1}, this mpoc reads format 1 or {FORMAT}"
    ) as caught:
        parse_manifest(json.dumps(value), HERE)
    assert "upgrade" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("at", "new", "said"),
    [
        (("layers", 0, "twist"), 3, "field 'twist' is not known"),
        (("source", "licence"), "mit", "field 'licence' is not known"),
        (("provenance",), {}, "field 'provenance' is not known"),
        (("layers", 1, "form"), "tucker", "layer 'fc.weight': form 'tucker' is not known"),
        (("layers", 1, "kind"), "lstm", "layer 'fc.weight': kind 'lstm' is not known"),
        (("layers", 1, "bonds"), {"0": 1}, "bonds = {'0': 1}"),
    ],
)
def test_names_the_later_version_that_wrote_a_file(at: tuple[Any, ...], new: Any, said: str) -> None:
    value = _with(json.loads(WHOLE.to_json()), at, new)
    text = json.dumps(value | {"tool": "mpoc 99.1.0"})
    with pytest.raises(MpocError) as caught:
        parse_manifest(text, HERE)
    assert str(caught.value) == f"{HERE}: written by mpoc 99.1.0, this is mpoc {__version__}: {said}"
    assert caught.value.hint == "pip install --upgrade mpoc"
    for tool in (f"mpoc {__version__}", "mpoc 0.0.1", "mpoc", "mpoc soon", "99.1.0 mpoc", None, 99):
        with pytest.raises(MpocError, match="damaged manifest"):
            parse_manifest(json.dumps(value | {"tool": tool}), HERE)


def test_reads_files_of_later_versions_in_a_known_format() -> None:
    later = manifest(*LAYERS, tool="mpoc 99.1.0")
    assert parse_manifest(later.to_json(), HERE) == later


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", '{"format": 1}', "[" * 100_000])
def test_rejects_malformed_manifests(text: str) -> None:
    with pytest.raises(MpocError, match=r"damaged manifest|format"):
        parse_manifest(text, HERE)
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(b"\xff" + text.encode(), HERE)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*at, key))


def _with(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    value = deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return value


@pytest.mark.slow
def test_any_single_change_is_rejected_or_consistent() -> None:
    whole = json.loads(WHOLE.to_json())
    replacements: list[Any] = [None, -1, 0, 1.5, True, "x", [], {}, [None], ["x"], {"a": 1}, [[]], [3, 4]]
    for at in _places(whole):
        for new in replacements:
            try:
                found = parse_manifest(json.dumps(_with(whole, at, new)), HERE)
            except MpocError:
                continue
            assert isinstance(found.rho + found.rho_selected + found.num_parameters, float)
            for layer in found.replaced:
                assert layer.structure.num_original == layer.num_original
                assert len(layer.bonds) == len(layer.structure.site_sizes) + 1
                assert len(layer.core_shapes) == layer.num_cores
            assert json.loads(found.to_json())


@pytest.mark.parametrize(
    ("key", "new"),
    [
        ("kind", "conv4d"),
        ("form", "tucker"),
        ("shape", [16, 12, 3, 4]),
        ("shape", [1728]),
        ("shape", [-16, -12, 3, 3]),
        ("num_original", 0),
        ("bonds", [1, 4, 1]),
        ("output_factors", [1, 4, 2, 1]),
        ("dtype", "float31"),
        ("stored_dtype", 32),
        ("spectra_of_weight", [None]),
        ("spectra_of_weight", [[[1, 0.5], [10**400, 0.1]], None, None, None]),
        ("spectra_of_weight", [[[1, 0.5], [2, 0.7]], None, None, None]),
        ("spectra_of_weight", [[[1, 0.5, 3]], None, None, None]),
        ("unknown", 1),
        ("name", None),
    ],
)
def test_rejects_damaged_records(key: str, new: Any) -> None:
    value = json.loads(WHOLE.to_json())
    value["layers"][0][key] = new
    with pytest.raises(MpocError, match=r"m\.safetensors: damaged manifest"):
        parse_manifest(json.dumps(value), HERE)


@pytest.mark.parametrize("low_rank", [-1, 0, 17, 10**30, 2.5, True, "5", None, [5]])
def test_rejects_impossible_low_rank_parts(low_rank: Any) -> None:
    value = json.loads(WHOLE.to_json())
    value["layers"][4]["low_rank"] = low_rank
    with pytest.raises(MpocError, match=r"m\.safetensors: damaged manifest"):
        parse_manifest(json.dumps(value), HERE)


@pytest.mark.parametrize(
    ("layer", "key", "new"), [(0, "low_rank", 3), (5, "low_rank", 1), (4, "form", "mpo")]
)
def test_rejects_low_rank_parts_of_other_forms(layer: int, key: str, new: Any) -> None:
    value = json.loads(WHOLE.to_json())
    value["layers"][layer][key] = new
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(json.dumps(value), HERE)


def test_names_the_cores_of_a_sum() -> None:
    layer = LAYERS[4]
    assert layer.core_names == [f"sum.cores.{k}" for k in range(layer.num_cores)]
    assert layer.core_shapes[-2:] == [(1, 16, 1, 5), (5, 1, 108, 1)]
    assert layer.num_stored == sum(math.prod(shape) for shape in layer.core_shapes)
    assert layer.bonds_text() == " ".join(map(str, layer.bonds[1:-1])) + " + r 5"


def test_rejects_empty_weights() -> None:
    value = json.loads(WHOLE.to_json())
    value["layers"][-1] |= {"shape": [0, 2], "num_original": 0, "num_stored": 0}
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(json.dumps(value), HERE)


def test_reads_manifests_without_architecture() -> None:
    value = json.loads(WHOLE.to_json())
    del value["architecture"]
    found = parse_manifest(json.dumps(value), HERE)
    assert found.architecture == {}
    assert "architecture" not in json.loads(found.to_json())  # nor is it written where there is none


def test_reads_manifests_without_spectra() -> None:
    value = json.loads(WHOLE.to_json())
    for layer in value["layers"]:
        layer.pop("spectra_of_weight", None)
    assert [layer.spectra_of_weight for layer in parse_manifest(json.dumps(value), HERE).layers] == [()] * 6


@pytest.mark.parametrize(
    "architecture", [{"code": "x"}, {"zoo": 3}, {"zoo": "fc2", "factory": "net.py:net"}, ["zoo"], None]
)
def test_rejects_damaged_architectures(architecture: Any) -> None:
    value = json.loads(WHOLE.to_json()) | {"architecture": architecture}
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(json.dumps(value), HERE)


@pytest.mark.parametrize("key", ["source", "layers", "options", "kinds_from"])
def test_rejects_missing_parts(key: str) -> None:
    value = json.loads(WHOLE.to_json())
    del value[key]
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(json.dumps(value), HERE)


def test_rejects_huge_matrices_in_small_files() -> None:
    layer: dict[str, Any] = {
        "name": "a.weight",
        "kind": "linear",
        "shape": [10, 64],
        "dtype": "float32",
        "form": "mpo",
    }
    layer |= {"num_original": 640, "num_stored": 256, "stored_dtype": "float32"}
    layer |= {"output_factors": [4] * 16, "input_factors": [4] * 16, "bonds": [1] * 17}
    value = json.loads(WHOLE.to_json()) | {"layers": [layer]}
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(json.dumps(value), Path("m.safetensors"))


def with_layer(k: int, **changes: Any) -> str:
    value = json.loads(WHOLE.to_json())
    value["layers"][k] |= changes
    return json.dumps(value)


def fc(factors: tuple[list[int], list[int]], bonds: list[int], form: str = "mpo", **changes: Any) -> str:
    """The second layer, of 64 inputs and 48 outputs, with other factors and counts that fit."""
    outputs, inputs = factors
    count = 0
    if len(bonds) == len(outputs) + 1:
        sites = zip(bonds, outputs, inputs, bonds[1:], strict=False)
        count = sum(math.prod(site) for site in sites)
    sides: dict[str, Any] = {"output_factors": outputs, "input_factors": inputs, "bonds": bonds, "form": form}
    return with_layer(
        1, **sides, num_stored=count, padding=[0, 0], entropies=[], spectra_of_weight=[], **changes
    )


HUGE = 10**18
GEOMETRY = {
    "size": [4, 4], "output_size": [4, 4], "kernel_size": [3, 3],
    "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros",
}  # fmt: skip
TOO_MUCH = {
    "sites without end": fc(([48] + [1] * 10**5, [64] + [1] * 10**5), [1] * (10**5 + 2)),
    "a tree without end": fc(([48] + [1] * 10**5, [64] + [1] * 10**5), [1] * (10**5 + 2), "tree"),
    "a MERA without end": fc(([48] + [1] * 10**5, [64] + [1] * 10**5), [2], "mera"),
    "a MERA of bond 10^9": fc(([6, 8], [8, 8]), [10**9], "mera"),
    "a bond of 10^18": fc(([6, 8], [8, 8]), [1, HUGE, 1]),
    "a bond below one": fc(([6, 8], [8, 8]), [1, -3, 1]),
    "a factor below one": fc(([-6, -8], [8, 8]), [1, 3, 1]),
    "a count that is none": with_layer(1, num_stored=10**400),
    "a count of another": with_layer(1, num_stored=5),
    "a padding of another": with_layer(1, padding=[1, 0]),
    "a number that is none": with_layer(1, relative_error=10**400),
    "a shape without end": with_layer(1, shape=[1] * 10**5 + [64, 48]),
    "a shape of more axes": with_layer(1, shape=[1, 64, 48]),
    "a huge shape": with_layer(1, shape=[HUGE, HUGE], num_original=HUGE * HUGE),
    "entropies without end": with_layer(1, entropies=[0.5] * 10**5),
    "a layer larger than its network": with_layer(
        5, shape=[300, 300], num_original=90_000, num_stored=90_000
    ),
    "integers as cores": with_layer(1, stored_dtype="int8"),
    "a geometry of nothing": with_layer(0, geometry=GEOMETRY | {"size": [HUGE, HUGE]}),
    "an order of another": with_layer(1, order="morton:1x9999999"),
    "an order without end": with_layer(1, order=[0] * (1 << 20) + [1]),
    "another of the same name": with_layer(1, name="conv.weight"),
    "same size as nothing": with_layer(1, same_size={"that": 1.0}),
}


@pytest.mark.parametrize("text", TOO_MUCH.values(), ids=TOO_MUCH)
def test_rejects_inconsistent_sizes(text: str) -> None:
    with pytest.raises(MpocError, match=r"^m\.safetensors: damaged manifest \(.{1,320}\)$"):
        parse_manifest(text, HERE)


def test_accepts_the_unchanged_layer() -> None:
    (layer,) = parse_manifest(fc(([6, 8], [8, 8]), [1, 3, 1]), HERE).layers[1:2]
    assert (layer.num_stored, layer.core_shapes) == (336, [(1, 6, 8, 3), (3, 8, 8, 1)])


JSON = {
    "a key twice": '{"format":1,"format":1}',
    "no number": WHOLE.to_json().replace("0.25", "NaN", 1),
    "an infinite number": WHOLE.to_json().replace("0.25", "-Infinity", 1),
    "a number too large": WHOLE.to_json().replace("0.25", "1e999", 1),
    "half a character": WHOLE.to_json().replace("0.1.0", "\\ud800", 1),
    "thousands of digits": WHOLE.to_json().replace("60000", "9" * 10_000, 1),
    "brackets without end": "[" * 10**6,
    "more than 100 MB": '{"format":1,"x":"' + " " * 100_000_001 + '"}',
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_rejects_malformed_json(text: str) -> None:
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(text, HERE)


@pytest.mark.parametrize(
    ("key", "new"),
    [
        ("tied", {"a": "a"}),
        ("tied", {"a": "b", "b": "c"}),
        ("tied", {"fc.weight": "head.weight"}),
        ("vectors", -1),
        ("source", {"name": "m", "nbytes": -5, "num_parameters": 60_000, "fingerprint": "x"}),
        ("source", {"name": "m", "nbytes": 5, "num_parameters": -60_000, "fingerprint": "x"}),
        ("training", {"steps": "many"}),
        ("training", {"steps": 1, "final": {"loss": "low"}}),
        ("training", {"steps": 1, "split": "test", "final": {"accuracy": 3}}),
        ("training", {"earlier": {"earlier": {"data": [1]}}}),
        ("training", {"sigma": 3.0}),
        ("calibration", {"samples": "all"}),
        ("calibration", {"shares": {"distances": {"a": "b"}}}),
        ("calibration", {"norms": {"before": None}}),
        ("calibration", {"likeness": {"this": {"kl": "0"}}}),
        ("calibration", {"likeness": {"this": {"kl": None}}}),
    ],
)
def test_rejects_inconsistent_parts(key: str, new: Any) -> None:
    value = json.loads(WHOLE.to_json()) | {key: new}
    with pytest.raises(MpocError, match="damaged manifest"):
        parse_manifest(json.dumps(value), HERE)


def test_reads_deeply_nested_histories() -> None:
    history: dict[str, Any] = {"steps": 1}
    for _ in range(400):
        history = {"steps": 1, "earlier": history}
    text = json.dumps(json.loads(WHOLE.to_json()) | {"training": history})
    assert parse_manifest(text, HERE).training == history


def test_rejects_manifest_links_leading_outside(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text(WHOLE.to_json())
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "mpoc.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(MpocError, match=r"mpoc\.json: a link to .*, outside the directory"):
        read_manifest(directory)
