from __future__ import annotations

import json
import os
import pty
import shlex
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import validate
from safetensors.torch import load_file

from mpoc.compression.size_table import SizeRow, SizeTable
from mpoc.errors import command_line
from mpoc.io.manifest_reader import read_manifest
from mpoc.reporting.schemas import schema
from mpoc.reporting.svg import limits
from tests.compression.calibrate.toy_networks import arch, make
from tests.compression.digits import ARCHITECTURE, write_network
from tests.support.checkpoints import contents, mlp_state, num_bytes, save_directory
from tests.support.process import Here, Mpoc


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.save({"state_dict": mlp_state(), "epoch": 3}, tmp_path / "mlp.pt")
    return tmp_path / "mlp.pt"


def test_writes_to_the_current_directory_and_prints_a_report(run: Mpoc, model: Path) -> None:
    done = run("compress", model, "--bond", 4)
    assert done.returncode == 0, done.stderr
    output = run.folder / "mlp.mpo.safetensors"
    assert list(run.folder.iterdir()) == [output]
    assert contents(model.parent).keys() == {"mlp.pt"}
    manifest = read_manifest(output)
    for layer in manifest.replaced:
        row = next(line for line in done.stdout.splitlines() if line.startswith(layer.layer))
        assert f"{layer.rho:.4f}" in row
        assert f"{layer.num_original:,} → {layer.num_stored:,}" in row
    assert f"ρ = {manifest.rho:.4f} over 2 replaced layers" in done.stdout
    assert "[2/2] fc2 mpo" in done.stderr
    assert "note: state dict taken from 'state_dict'" in done.stderr
    assert "wrote mlp.mpo.safetensors" in done.stderr
    assert done.stderr.splitlines()[-1] == "next: mpoc report mlp.mpo.safetensors"
    assert "\x1b" not in done.stdout + done.stderr  # no colours in a pipe
    following = run(*done.stderr.splitlines()[-1].split()[2:])
    assert following.returncode == 0
    assert f"ρ = {manifest.rho:.4f}" in following.stdout


def test_directory_output_keeps_every_other_file(here: Here, tmp_path: Path) -> None:
    source = save_directory(tmp_path / "bert", mlp_state(), shards=2)
    done = here(
        "compress", f"{source}/", "--ratio", 0.5, "--calibrate", "none", "--max-shard-size", "4kB", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in here.folder.iterdir()] == ["bert-mpo"]
    names = contents(here.folder / "bert-mpo").keys()
    assert {"config.json", "tokenizer.json", "README.md", "mpoc.json", "model.safetensors.index.json"} < names
    assert all((here.folder / "bert-mpo" / name).stat().st_size < 6000 for name in names)


def test_json_fills_stdout_and_quiet_silences_stderr(here: Here, model: Path) -> None:
    done = here("compress", model, "--max-error", 0.9, "-o", "out.safetensors", "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["written"] == "out.safetensors"
    assert report["totals"]["bytes_after"] == num_bytes(here.folder / "out.safetensors")
    assert [layer["layer"] for layer in report["layers"]] == ["fc1", "fc2"]
    assert all(layer["relative_error"] <= 0.9 and layer["seconds"] >= 0 for layer in report["layers"])


def test_dry_run_prints_the_plan_and_writes_nothing(here: Here, model: Path) -> None:
    done = here("compress", model, "--size", "9kB", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["written"] is None
    assert plan["totals"]["bytes_after"] <= 9000
    assert "wrote" not in done.stderr
    assert contents(here.folder) == {}
    done = here("compress", model, "--bond", 4, "--dry-run", "--verbose", "--exclude", "fc2")
    assert "predicted at most" in done.stdout
    assert "fc2.weight: matched by --exclude" in done.stdout
    assert contents(here.folder) == {}


def test_budgets_of_known_networks_are_calibrated_on_self_made_data(here: Here) -> None:
    from tests.support.architectures import tiny

    tiny("gpt2", layers=1).save_pretrained(here.folder / "gpt2")
    words = ["compress", "gpt2", "--size", "60%", "--effort", "fast", "--dry-run", "--json"]
    done = here(*words, "--calibration-samples", 4)
    assert done.returncode == 0, done.stderr
    said = "calibrating on self-made data, as no --calibrate is given (none: weights alone)"
    assert said in done.stderr and "4 examples of text of its own writing (seed 0), 1 held out" in done.stderr
    assert json.loads(done.stdout)["calibration"]["data"] == {"name": "text of its own writing"}
    done = here(*words[:4], "--calibrate", "none", "--dry-run", "--json")
    assert "calibrat" not in done.stderr and json.loads(done.stdout)["calibration"] == {}
    done = here(*words[:4], "--calibrate", "./self")
    assert done.returncode == 2 and "error: self: no such file or directory" in done.stderr
    config = here.folder / "gpt2" / "config.json"
    config.write_text(config.read_text().replace('"gpt2"', '"of nobody"'))
    done = here(*words[:4], "--dry-run", "--json")
    assert done.returncode == 0 and "note: not calibrated, fitted to the weights alone: gpt2: " in done.stderr
    assert json.loads(done.stdout)["calibration"] == {}
    done = here(*words)  # --effort asks for it
    assert done.returncode == 1 and "error: gpt2: transformers cannot make this network" in done.stderr


def test_options_and_recipe_combine(here: Here, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bond = 2\nexclude = ["nothing*"]\n\n[layer.fc2]\nbond = 3\nsites = 2\n')
    arguments = ["compress", model, "--recipe", recipe, "--exclude", "*.bias", "--dtype", "bfloat16"]
    arguments += ["--shape", "fc1=4x4x3:4x4x4", "-o", "out.safetensors", "--json", "--quiet"]
    done = here(*arguments)
    assert done.returncode == 0, done.stderr
    fc1, fc2 = json.loads(done.stdout)["layers"]
    assert (fc1["input_factors"], fc1["output_factors"]) == ([4, 4, 3], [4, 4, 4])
    assert fc1["bonds"] == [1, 2, 2, 1]
    assert fc2["bonds"] == [1, 3, 1]
    stored = load_file(here.folder / "out.safetensors")
    assert stored["fc1.cores.0"].dtype == torch.bfloat16
    assert stored["fc1.bias"].dtype == torch.float32


def test_replaces_existing_output_only_with_force(here: Here, model: Path) -> None:
    output = here.folder / "mlp.mpo.safetensors"
    output.write_text("mine")
    refused = here("compress", model, "--bond", 4)
    assert refused.returncode == 2
    assert "mlp.mpo.safetensors: exists already" in refused.stderr
    assert "--force" in refused.stderr
    assert contents(here.folder) == {output.name: b"mine"}
    assert here("compress", model, "--bond", 4, "--force").returncode == 0
    assert read_manifest(output).options["bond"] == 4
    assert list(here.folder.iterdir()) == [output]


def test_output_is_deterministic_across_processes(run: Mpoc, model: Path) -> None:
    for name in ("a", "b"):
        done = run("compress", model, "--bond", 4, "-o", f"{name}.safetensors", "--seed", 5, "--quiet")
        assert done.returncode == 0, done.stderr
    assert (run.folder / "a.safetensors").read_bytes() == (run.folder / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compress"], "Missing argument 'MODEL'"),
        (["compress", "m.pt", "--bond", "many"], "--bond"),
        (
            ["compress", "m.pt", "--bond", "0"],
            "error: --bond 0: the bond dimension must be positive",
        ),
        (["compress", "m.pt", "--bnod", "4"], "No such option"),
        (["compres", "m.pt"], "No such command"),
    ],
)
def test_bad_command_line_exits_with_2(here: Here, arguments: list[str], said: str) -> None:
    done = here(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_no_goal_prints_sizes_and_writes_nothing(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    write_network(here.folder)
    words = ["compress", "net.safetensors", *ARCHITECTURE, "--layers", "fc2", "--layers", "conv1"]
    words += ["--calibrate", "digits.npz", "--calibration-samples", "24"]
    monkeypatch.setattr("sys.argv", ["mpoc", *words, "--json", "--plot", "sizes.svg"])
    done = here(*words, "--json", "--plot", "sizes.svg")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in here.folder.iterdir()} == {"net.safetensors", "digits.npz", "sizes.svg"}
    assert "<svg" in (here.folder / "sizes.svg").read_text()
    table = json.loads(done.stdout)
    validate(table, schema("sizes"))
    for row in table["rows"]:
        assert row["command"] == command_line("mpoc", *words, "--size", f"{row['share']:.0%}")
        assert row["likeness"].keys() >= {"this", "rounded to nearest"}
    first = table["rows"][0]
    assert here(*shlex.split(first["command"])[1:], "--effort", "fast", "-o", "o.safetensors").returncode == 0
    kept = read_manifest(here.folder / "o.safetensors")
    assert kept.calibration["likeness"]["this"] == first["likeness"]["this"]
    assert kept.bits_per_weight == first["bits_per_weight"]
    assert (here.folder / "o.safetensors").stat().st_size <= first["nbytes"] <= table["source"]["nbytes"]


def test_no_goal_and_no_data_print_sizes_and_errors_of_weights(here: Here, model: Path) -> None:
    before = contents(model.parent)
    done = here("compress", model)
    assert (done.returncode, [*here.folder.iterdir()]) == (0, [])
    assert contents(model.parent) == before
    errors = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.lstrip()[:2].isdigit()]
    assert len(errors) >= 2 and errors == sorted(errors)
    assert "--calibrate DATA and --arch NETWORK" in done.stdout
    for words in (["-o", "o.pt"], ["--dry-run"], ["--force"], ["--resume"], ["--eval", "d.npz"]):
        done = here("compress", model, *words)
        assert done.returncode == 2 and "requires a goal" in done.stderr


def test_rounding_errors_do_not_keep_a_table_from_being_drawn() -> None:
    likeness: list[dict[str, dict[str, float]]] = [
        {"this": {"agreement": 100.0, "kl": -1e-9}, "rounded to nearest": {"agreement": 90.0, "kl": 0.0}},
        {"this": {"agreement": 99.0, "kl": 0.1}, "rounded to nearest": {"agreement": 10.0}},  # not finite
    ]
    rows = [SizeRow(k / 8, k, 2.0, found, None) for k, found in zip((2, 1), likeness, strict=True)]
    chart = SizeTable("m", 8, rows, "fast", {}, True, []).chart()
    assert [len(series.points) for series in chart.series] == [2, 1, 0]
    assert limits(chart.y, chart.values(1))[0] > 0


def test_terminal_shows_a_progress_bar(run: Mpoc, model: Path) -> None:
    master, slave = pty.openpty()
    process = run.start("compress", model, "--bond", 4, stderr=slave)
    os.close(slave)
    shown = b""
    with suppress(OSError):  # so a pseudo-terminal ends
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert b"2/2 layers" in shown
    assert b"\x1b" in shown
    assert b"[2/2]" not in shown
    assert out.startswith("layer")


def test_refine_requires_calibrate(here: Here, model: Path) -> None:
    done = here("compress", model, "--bond", 4, "--refine")
    assert done.returncode == 2
    assert "--refine requires --calibrate" in done.stderr
    assert list(here.folder.iterdir()) == []


@pytest.mark.slow
def test_refine_is_reported_and_recorded(here: Here, tmp_path: Path) -> None:
    torch.save(make("blocks").state_dict(), tmp_path / "m.pt")
    np.savez(tmp_path / "data.npz", x_train=np.random.default_rng(0).random((40, 16), np.float32),
             y_train=np.zeros(40, np.int64))  # fmt: skip
    done = here(
        "compress", tmp_path / "m.pt", "--arch", arch("blocks"), "--ratio", 0.5, "--calibrate",
        tmp_path / "data.npz", "--refine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of 2 blocks: relative error of their outputs on held-out examples" in done.stderr
    assert list(read_manifest(here.folder / "m.mpo.safetensors").calibration["refined"]) == ["0", "1"]
