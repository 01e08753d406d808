"""The schemas hold for real reports and manifests, and refuse what the published ones refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator, ValidationError
from torch import nn

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.recipe_syntax import parse_input_shape
from mpoc.errors import UsageError
from mpoc.io.manifest import Manifest, Source
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.safetensors_header import read_header
from mpoc.io.weight_files import output_bytes
from mpoc.reporting.schemas import NAMES, schema
from mpoc.reporting.summary import SCHEMA, report_dict, to_json
from tests.support.checkpoints import mlp_state, save_directory
from tests.support.process import Here
from tests.support.sums import compress_to_sums

SCHEMAS = {name: schema(name) for name in NAMES}
CHECKS = {name: Draft202012Validator(found) for name, found in SCHEMAS.items()}
PUBLISHED = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in (Path(__file__).parent / "schemas").glob("*.json")
}


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
    assert caught.value.hint == "one of report, manifest, sizes"


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


@pytest.mark.slow
def test_calibrated_output_with_scores_and_trials_conforms(here: Here) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    torch.save(network.state_dict(), "m.pt")
    Path("net.py").write_text(NETWORK)
    x, y = np.random.default_rng(0).random((40, 1, 4, 6), np.float32), np.arange(40) % 4
    np.savez("train.npz", x=x, y=y)
    common = "compress m.pt --arch net.py:network --calibrate train.npz --eval train.npz --form svd --json"
    once = here(*common.split(), "--ratio", 0.5, "-o", "a.safetensors")
    search = here(*common.split(), "--max-drop", 90, "-o", "b.safetensors")
    measured = {"evaluation", "written", "measured", "headline"}
    for done, more in ((once, measured), (search, measured | {"search"})):
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


@pytest.mark.parametrize("name", NAMES)
def test_generated_schemas_match_the_published_ones(name: str) -> None:
    """The files in schemas/ were written by hand; only titles and descriptions may differ."""
    assert without_words(SCHEMAS[name]) == without_words(resolved(PUBLISHED[name], PUBLISHED[name]))


def test_a_report_has_all_fields_of_its_schema() -> None:
    report = SCHEMAS["report"]["properties"]
    plain = report_dict(Manifest(Source("m", 1, 1, "f"), (), {}, ""), 1)
    assert report.keys() == {*plain, "written", "evaluation", "search"}
    assert report["totals"]["properties"].keys() == plain["totals"].keys()
    assert report["schema"] == {"const": SCHEMA}


def resolved(value: Any, document: dict[str, Any]) -> Any:
    """A hand-written schema in one piece: every ``$ref`` followed, ``allOf`` merged."""
    if isinstance(value, list):
        return [resolved(item, document) for item in value]
    if not isinstance(value, dict):
        return value
    whole: dict[str, Any] = {}
    if "$ref" in value:
        file, _, path = value["$ref"].partition("#")
        document = PUBLISHED[file.removesuffix(".json")] if file else document
        target: Any = document
        for part in filter(None, path.split("/")):
            target = target[part]
        whole |= resolved(target, document)
    for part in value.get("allOf", ()):
        whole |= resolved(part, document)
    for key in value.keys() - {"$ref", "$defs", "$id", "allOf"}:
        item = resolved(value[key], document)
        if key in whole and key in ("properties", "required"):
            item = {**whole[key], **item} if isinstance(item, dict) else [*whole[key], *item]
        whole[key] = item
    return whole


def without_words(value: Any, names: bool = False) -> Any:
    """A schema without titles and descriptions, its unordered lists sorted; an enum needs no type."""
    if isinstance(value, list):
        return [without_words(item) for item in value]
    if not isinstance(value, dict):
        return value
    left_out = set() if names else {"$schema", "title", "description"}
    left_out |= {"type"} if "enum" in value and not names else set()
    found = {key: without_words(value[key], key == "properties") for key in value.keys() - left_out}
    for key in () if names else {"required", "enum", "type"} & found.keys():
        found[key] = sorted(found[key]) if isinstance(found[key], list) else found[key]
    return found
