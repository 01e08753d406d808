"""The schemas hold for real reports and manifests, and name all of their fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator, ValidationError
from torch import nn

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.recipe_syntax import parse_input_shape
from mpoc.errors import UsageError
from mpoc.io.manifest import DENSE, FORMAT, LayerRecord, Manifest, Source
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.safetensors_header import read_header
from mpoc.io.weight_files import output_bytes
from mpoc.reporting.schemas import NAMES, schema
from mpoc.reporting.summary import SCHEMA, report_dict, to_json
from mpoc.tensor_networks.forms import FORMS
from mpoc.tensor_networks.geometry import PADDING_MODES, Geometry
from mpoc.tensor_networks.structure import KINDS
from tests.support.checkpoints import mlp_state, save_directory
from tests.support.process import Here
from tests.support.sums import compress_to_sums

SCHEMAS = {name: schema(name) for name in NAMES}
CHECKS = {name: Draft202012Validator(found) for name, found in SCHEMAS.items()}
LAYER = SCHEMAS["manifest"]["$defs"]["layer"]
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def holds(path: Path) -> None:
    """Both schemas hold for the compressed file at ``path``."""
    manifest = read_manifest(path)
    CHECKS["manifest"].validate(json.loads(manifest.to_json()))
    CHECKS["report"].validate(json.loads(to_json(report_dict(manifest, output_bytes(path)))))


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_valid_json_schemas(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])


def test_unknown_schema_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="did you mean 'report'") as caught:
        schema("reports")
    assert caught.value.hint == "one of report, manifest"


@pytest.mark.parametrize(
    "options",
    [{"bond": 4}, {"max_error": 0.5}, {"ratio": 0.5, "form": "svd"}, {"size": 40_000, "embeddings": True}],
    ids=str,
)
def test_compress_output_conforms(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    output = tmp_path / ("out" if source.is_dir() else "out.safetensors")
    done = compress_checkpoint(source, output, make_recipe(None, options))
    holds(output)
    timed = report_dict(done.manifest, done.nbytes, done.seconds) | {"written": str(output)}
    CHECKS["report"].validate(json.loads(to_json(timed)))


def test_sums_conform(source: Path, tmp_path: Path) -> None:
    output = tmp_path / ("out" if source.is_dir() else "out.safetensors")
    compress_to_sums(source, output)
    holds(output)


def test_whole_maps_conform(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.randn(8, 8, 3, 3)}, tmp_path / "m.pt")
    options = {"bond": 2, "conv": "map", "input_shape": [parse_input_shape("4x4")]}
    compress_checkpoint(tmp_path / "m.pt", tmp_path / "out.safetensors", make_recipe(None, options))
    assert read_manifest(tmp_path / "out.safetensors").layers[0].geometry is not None
    holds(tmp_path / "out.safetensors")


def test_directories_without_manifest_conform(tmp_path: Path) -> None:
    output = tmp_path / "out"
    compress_checkpoint(save_directory(tmp_path / "m", mlp_state()), output, make_recipe(None, {"bond": 4}))
    (output / "mpoc.json").unlink()
    assert not read_manifest(output).is_complete
    holds(output)


NETWORK = """
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
"""


def test_calibrated_output_with_scores_and_trials_conforms(here: Here) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    torch.save(network.state_dict(), "m.pt")
    Path("net.py").write_text(NETWORK)
    x, y = np.random.default_rng(0).random((40, 1, 4, 6), np.float32), np.arange(40) % 4
    np.savez("train.npz", x=x, y=y)
    common = "compress m.pt --arch net.py:network --calibrate train.npz --eval train.npz --form svd --json"
    once = here(*common.split(), "--ratio", 0.5, "-o", "a.safetensors")
    search = here(*common.split(), "--max-drop", 90, "-o", "b.safetensors")
    for done, more in ((once, {"evaluation", "written"}), (search, {"evaluation", "written", "search"})):
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        CHECKS["report"].validate(report)
        assert report.keys() - SCHEMAS["report"]["required"] == more
        assert report.keys() <= SCHEMAS["report"]["properties"].keys()
    assert read_manifest(Path("a.safetensors")).calibration
    holds(Path("a.safetensors"))


def test_output_of_earlier_versions_conforms() -> None:
    kept = Path(__file__).parents[1] / "kept"
    of_file = read_header(kept / "format-1.safetensors").metadata["mpoc"]
    for text in (of_file, (kept / "format-1" / "mpoc.json").read_text("utf-8")):
        CHECKS["manifest"].validate(json.loads(text))
    holds(kept / "format-1.safetensors")
    holds(kept / "format-1")


@pytest.mark.parametrize(
    ("at", "wrong"),
    [
        (("layers", 0, "form"), "tucker"),
        (("layers", 0, "shape"), [64, "48"]),
        (("layers", 0, "bonds"), 4),
        (("layers", 0, "num_stored"), 0),
        (("layers", 0, "relative_error"), "small"),
        (("source", "num_parameters"), None),
        (("architecture",), {"code": "x"}),
        (("tied",), {"a": 1}),
    ],
)
def test_schemas_reject_wrong_values(tmp_path: Path, at: tuple[Any, ...], wrong: Any) -> None:
    torch.save(mlp_state(), tmp_path / "m.pt")
    done = compress_checkpoint(tmp_path / "m.pt", tmp_path / "o.safetensors", make_recipe(None, {"bond": 4}))
    values = {"manifest": json.loads(done.manifest.to_json()), "report": report_dict(done.manifest, 1)}
    for name, value in values.items():
        damaged = json.loads(json.dumps(value))
        CHECKS[name].validate(damaged)
        inner = damaged
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = wrong
        with pytest.raises(ValidationError):
            CHECKS[name].validate(damaged)


def test_schemas_list_exactly_the_fields() -> None:
    manifest, report = SCHEMAS["manifest"]["properties"], SCHEMAS["report"]["properties"]
    compare(LayerRecord, LAYER["properties"])
    compare(Source, manifest["source"]["properties"])
    compare(Geometry, LAYER["$defs"]["geometry"]["properties"])
    compare(Manifest, {key: value for key, value in manifest.items() if key != "format"})
    plain = report_dict(Manifest(Source("m", 1, 1, "f"), (), {}, ""), 1)
    assert report.keys() == {*plain, "written", "evaluation", "search"}
    assert report["totals"]["properties"].keys() == plain["totals"].keys()


def test_schema_types_match_nested_fields() -> None:
    pairs = {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "number"}]}
    spectra = {"type": "array", "items": {"type": ["array", "null"], "items": pairs}}
    assert allowed(spectra) == json_types(tuple[tuple[tuple[int, float], ...] | None, ...])
    assert allowed(spectra) != json_types(tuple[tuple[tuple[int, float], ...], ...])
    assert allowed(spectra) != json_types(tuple[tuple[tuple[int, int], ...] | None, ...])


def test_schemas_list_all_values() -> None:
    assert LAYER["properties"]["kind"]["enum"] == list(KINDS)
    assert set(LAYER["properties"]["form"]["enum"]) == {*FORMS, DENSE}
    modes = LAYER["$defs"]["geometry"]["properties"]["padding_mode"]["enum"]
    assert modes == list(PADDING_MODES)
    assert SCHEMAS["manifest"]["properties"]["format"] == {"const": FORMAT}
    assert SCHEMAS["report"]["properties"]["schema"] == {"const": SCHEMA}


def compare(record: type[Any], properties: Mapping[str, Any]) -> None:
    """A dataclass against the properties that stand for it: names, and the types that annotations say."""
    assert {field.name for field in fields(record)} == properties.keys()
    for name, expected in get_type_hints(record).items():
        found = resolved(properties[name])
        if "enum" not in found:
            assert allowed(found) == json_types(expected), f"{record.__name__}.{name}"


def resolved(value: Mapping[str, Any]) -> dict[str, Any]:
    """A property of a layer with its ``$ref`` into ``$defs`` followed."""
    found = dict(deepcopy(value))
    name = str(found.pop("$ref", "")).rpartition("/")[2]
    return {"type": "object"} if name == "layer.json" else found | (LAYER["$defs"][name] if name else {})


def allowed(found: Mapping[str, Any]) -> set[str]:
    """``array of integer`` and the like: the types that a property may have."""
    if "anyOf" in found:
        return set().union(*(allowed(resolved(one)) for one in found["anyOf"]))
    types = {found["type"]} if isinstance(found["type"], str) else set(found["type"])
    items = found.get("prefixItems", [found["items"]] if "items" in found else [])
    return types - {"array"} | {f"array of {kind}" for one in items for kind in allowed(resolved(one))}


def json_types(expected: Any) -> set[str]:
    """The same of an annotation."""
    kind, inner = get_origin(expected), get_args(expected)
    if kind is tuple:
        return {f"array of {one}" for part in inner if part is not ... for one in json_types(part)}
    if kind is dict or expected in (LayerRecord, Source, Geometry):
        return {"object"}
    return set().union(*map(json_types, inner)) if inner else {JSON_TYPES[expected]}
