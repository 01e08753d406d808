from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support.checkpoints import contents, network_state, num_bytes, save_directory
from tests.support.process import Here, Mpoc


@pytest.fixture(params=["file", "directory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    source = tmp_path / "m.pt"
    if request.param == "directory":
        source = save_directory(tmp_path / "m", network_state())
    else:
        torch.save(network_state(), source)
    output = tmp_path / ("out" if source.is_dir() else "out.safetensors")
    compress_checkpoint(source, output, make_recipe(None, {"bond": 4}))
    return output


def test_table_json_and_csv_agree(run: Mpoc, output: Path) -> None:
    before = contents(output)
    table, as_json, as_csv = (run("report", output, *option) for option in ([], ["--json"], ["--csv"]))
    for done in (table, as_json, as_csv):
        assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(as_json.stdout)
    rows = list(csv.DictReader(io.StringIO(as_csv.stdout)))
    assert report["schema"].startswith("mpoc.report/")
    assert [row["layer"] for row in rows] == [layer["layer"] for layer in report["layers"]]
    lines = table.stdout.splitlines()
    for row, layer in zip(rows, report["layers"], strict=True):
        assert int(row["num_stored"]) == layer["num_stored"]
        assert float(row["rho"]) == layer["rho"] == layer["num_stored"] / layer["num_original"]
        assert row["bonds"] == "×".join(map(str, layer["bonds"]))
        line = next(line for line in lines if line.startswith(f"{layer['layer']} "))
        assert (f"{layer['rho']:.4f}" in line) == (layer["form"] == "mpo")
    replaced = [layer for layer in report["layers"] if layer["form"] == "mpo"]
    totals = report["totals"]
    assert 0 < len(replaced) == totals["layers_replaced"] < totals["layers_selected"] == len(rows)
    stored = sum(layer["num_stored"] for layer in replaced)
    assert totals["rho"] == stored / sum(layer["num_original"] for layer in replaced)
    assert totals["bytes_after"] == num_bytes(output)
    assert f"ρ = {totals['rho']:.4f} over {len(replaced)} replaced layers" in table.stdout
    assert contents(output) == before


def test_verbose_lists_skipped_tensors(here: Here, output: Path) -> None:
    quiet, verbose = here("report", output), here("report", output, "--verbose")
    assert "embeddings.weight" not in quiet.stdout
    assert "  embeddings.weight: embedding (--embeddings includes it)" in verbose.stdout
    assert "unchanged: 1 embedding" in quiet.stdout


def test_closed_pipe_is_not_an_error(run: Mpoc, output: Path) -> None:
    for option in ([], ["--json"]):
        process = run.start("report", output, *option)
        assert process.stdout is not None
        process.stdout.close()
        process.wait(timeout=100)
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.safetensors", b""),
        ("text.safetensors", b"hello world, hello world\n"),
        ("zeros.safetensors", bytes(100)),
        ("huge.safetensors", b"\xff" * 8 + b"{}"),
        ("list.safetensors", (9).to_bytes(8, "little") + b"[1, 2, 3]"),
        ("metadata.safetensors", (22).to_bytes(8, "little") + b'{"__metadata__": [12]}'),
        ("manifest.safetensors", (31).to_bytes(8, "little") + b'{"__metadata__": {"mpoc": "{"}}'),
        ("model.pt", b"PK\x03\x04"),
        ("folder/mpoc.json", b"\xff\xfe\x00"),
        ("folder/mpoc.json", b'{"format": 1}'),
        ("folder/config.json", b"{}"),
    ],
)
def test_rejects_garbage_in_one_line(here: Here, name: str, content: bytes) -> None:
    file = here.folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    path = Path(name).parts[0]
    done = here("report", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def test_rejects_uncompressed_safetensors(here: Here, tmp_path: Path) -> None:
    save_file(network_state(), tmp_path / "m.safetensors", {"format": "pt"})
    done = here("report", tmp_path / "m.safetensors")
    assert (done.returncode, done.stdout) == (1, "")
    assert "m.safetensors: not compressed by mpoc (no manifest)" in done.stderr
    assert "hint: mpoc compress MODEL makes one that is" in done.stderr


def test_rejects_json_with_csv(here: Here, output: Path) -> None:
    done = here("report", output, "--json", "--csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: --json and --csv exclude each other" in done.stderr
