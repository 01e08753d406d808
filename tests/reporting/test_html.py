"""The page: self-contained, escaped, of every kind of file, and not large."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.io.manifest import Source
from mpoc.io.manifest_reader import read_manifest
from mpoc.reporting.contents import FileData, read_file, read_files
from mpoc.reporting.html import page, write_page
from tests.reporting.files import HOSTILE, LONG, changed, compressed, every_kind, many_layers, rewritten
from tests.reporting.test_markup import read
from tests.support.checkpoints import network_state, save_directory
from tests.support.sums import compress_to_sums

VOID = ("meta", "wbr", "circle", "line", "path", "rect")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_kind(tmp_path_factory.mktemp("file"))


def shown(path: Path) -> str:
    return page([read_file(path)])


def assert_whole(text: str) -> None:
    """Every element is closed, every anchor there once."""
    for name in {tag for tag, _ in read(text).found} - set(VOID):
        assert len(re.findall(rf"<{name}[ >]", text)) == text.count(f"</{name}>"), name
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r' href="#([^"]+)"', text)) <= set(ids)


def test_page_is_self_contained(path: Path) -> None:
    text = shown(path)
    style_and_script = re.findall(r"<(?:style|script)>.*?</(?:style|script)>", text, re.DOTALL)
    assert len(style_and_script) == 2
    for word in ("http:", "https:", "@import", "url(", "fetch(", "XMLHttp"):
        assert not [part for part in style_and_script if word in part]
    used = {(tag, key) for tag, attributes in read(text).found for key in attributes}
    assert not used & {("link", "href"), ("script", "src"), ("img", "src"), ("svg", "href")}


def test_escapes_names(path: Path) -> None:
    text = shown(path)
    reader = read(text)
    assert HOSTILE in reader.text and LONG in reader.text
    assert "digits<i>" in reader.text
    found = [tag for tag, _ in reader.found]
    assert "img" not in found and found.count("script") == 1
    assert not [key for _, attributes in reader.found for key in attributes if key.startswith("on")]


def test_escapes_reason_kind_and_tool(path: Path) -> None:
    manifest = read_manifest(path)
    layers = tuple(replace(one, reason=HOSTILE) if one.form == "dense" else one for one in manifest.layers)
    architecture = {"zoo": HOSTILE}
    manifest = replace(
        manifest, layers=layers, tool=HOSTILE, kinds_from=HOSTILE, left_alone={HOSTILE: HOSTILE},
        tied={HOSTILE: HOSTILE}, architecture=architecture, source=Source(HOSTILE, 1, 1, HOSTILE),
    )  # fmt: skip
    text = page([FileData(HOSTILE, manifest, 1, ()), FileData(HOSTILE, manifest, 1, ())])
    found = [tag for tag, _ in read(text).found]
    assert "img" not in found and found.count("script") == 1


def test_lists_every_layer(path: Path) -> None:
    text = shown(path)
    assert_whole(text)
    manifest = read_manifest(path)
    rows = re.search(r'class="sortable layers">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert rows is not None and rows[1].count("<tr") == len(manifest.layers)
    assert text.count('<details class="layer"') == len(manifest.replaced)
    assert (
        f"{manifest.rho:.4f}" in text and "Loss while training" in text and "Accuracy while training" in text
    )
    assert "fine-tuned on digits&lt;i&gt;" in text


def test_output_is_deterministic(path: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page(path, tmp_path / name, [path])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_renders_a_directory(tmp_path: Path) -> None:
    source = save_directory(tmp_path / "m", network_state(), shards=3)
    compress_checkpoint(source, tmp_path / "out", make_recipe(None, {"bond": 4}))
    assert_whole(shown(tmp_path / "out"))


def test_sum_shows_both_terms(tmp_path: Path) -> None:
    torch.save(network_state(), tmp_path / "m.pt")
    compress_to_sums(tmp_path / "m.pt", tmp_path / "s.safetensors")
    text = shown(tmp_path / "s.safetensors")
    assert_whole(text)
    assert text.count('class="m plus">+<') == len(read_manifest(tmp_path / "s.safetensors").replaced)
    assert "Low-rank part" in text


@pytest.mark.slow
def test_mera_explains_missing_entropies(tmp_path: Path) -> None:
    text = shown(compressed(tmp_path, {"a.weight": torch.randn(16, 16)}, bond=2, form="mera", sites=4))
    assert_whole(text)
    assert "no single bond separates a MERA into two parts" in text and "Schmidt" not in text


def test_renders_a_file_of_dense_layers(path: Path) -> None:
    manifest = read_manifest(path)
    manifest = replace(manifest, layers=tuple(one for one in manifest.layers if one.form == "dense"))
    text = page([FileData("m", manifest, 1, ())])
    assert_whole(text)
    assert len(manifest.layers) == 1 and '<details class="layer"' not in text
    assert "1.0000" in text
    assert_whole(page([FileData("m", replace(manifest, layers=()), 1, ())]))


def test_renders_single_sites_and_zero_weights(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(7, 5), "b.weight": torch.zeros(32, 32)}
    path = compressed(tmp_path, state, bond=2, allow_growth=True)
    assert [len(layer.bonds) for layer in read_manifest(path).layers] == [2, 5]
    assert_whole(shown(path))


def test_renders_records_without_errors(path: Path) -> None:
    """As of a directory that transformers saved again."""
    manifest = read_manifest(path)
    unknown = changed(
        manifest, relative_error=None, entropies=(), entropies_of_weight=(), spectra_of_weight=()
    )
    unknown = replace(unknown, source=Source(None, None, manifest.source.num_parameters, None), training={})
    again = rewritten(path, unknown)
    text = page(read_files(again, [again]))
    assert_whole(text)
    assert "errors, entropies, original size" in text
    assert "not every file records them" in text


def test_compares_layers_by_name(path: Path, tmp_path: Path) -> None:
    other = compressed(tmp_path, bond=2)
    text = page(read_files(path, [other]))
    assert_whole(text)
    tables = re.findall(r'<table class="sortable">.*?</table>', text, re.DOTALL)
    names = {one.layer for file in (path, other) for one in read_manifest(file).layers}
    assert len(tables) == 1 and tables[0].count("<tr") == 2 + len(names)
    common = sum(len(read_manifest(file).layers) for file in (path, other)) - len(names)
    assert f"mean relative error, layers in common: {common}<" in text


def test_warns_about_weight_errors_of_calibrated_files(path: Path) -> None:
    fitted = rewritten(path, replace(read_manifest(path), calibration={"samples": 64}))
    assert f"Calibrated: {fitted.name}." in page(read_files(path, [fitted]))
    assert "Errors below are errors of weights" not in page(read_files(path, [path]))
    assert "Errors below are errors of weights" not in page(read_files(fitted, [fitted]))


@pytest.mark.slow
def test_page_of_200_layers_is_small(tmp_path: Path) -> None:
    text = shown(many_layers(tmp_path, 20))
    assert_whole(text)
    assert len(text) < 20 * 15_000
