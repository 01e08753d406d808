"""Compressed files to draw: of every kind that the page has to show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.io.checkpoint import open_safetensors
from mpoc.io.manifest import LayerRecord, Manifest
from mpoc.io.manifest_reader import read_manifest
from mpoc.io.safetensors_writer import Entry, write_safetensors
from tests.support.checkpoints import network_state

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<b>.$x$"
LONG = "bert.encoder.layer.11.attention.output.self_attention_projection.dense_and_rather_long_besides"
TRAINING: dict[str, Any] = {
    "data": {"name": "digits<i>"},
    "task": "classification",
    "metric": "accuracy",
    "split": "validation",
    "steps": 20,
    "evaluations": [
        {"step": 0, "epoch": 0.0, "train_loss": None, "loss": 2.3, "accuracy": 10.0},
        {"step": 10, "epoch": 0.5, "train_loss": 1.5, "loss": 1.2, "accuracy": 60.0},
        {"step": 20, "epoch": 1.0, "train_loss": 0.7, "loss": 0.9, "accuracy": 80.0},
    ],
    "start": {"accuracy": 10.0},
    "final": {"accuracy": 80.0},
}


def compressed(folder: Path, state: dict[str, torch.Tensor] | None = None, **options: Any) -> Path:
    """A file made of ``state``."""
    folder.mkdir(exist_ok=True)
    torch.save(state or network_state(), folder / "m.pt")
    output = folder / "m.mpo.safetensors"
    compress_checkpoint(folder / "m.pt", output, make_recipe(None, options or {"bond": 4}))
    return output


def one_layer(folder: Path) -> Path:
    """A linear map that was trained, which is quickly drawn."""
    path = compressed(folder, {f"{HOSTILE}.weight": torch.randn(48, 64)}, bond=4)
    return rewritten(path, replace(read_manifest(path), training=TRAINING))


def every_kind(folder: Path) -> Path:
    """A convolution, linear maps, one that stays dense; a hostile name and a long one; a training."""
    state = network_state()
    for old, new in (("fc1", HOSTILE), ("fc2", LONG)):
        for part in ("weight", "bias"):
            state[f"{new}.{part}"] = state.pop(f"{old}.{part}")
    path = compressed(folder, state)
    return rewritten(path, replace(read_manifest(path), training=TRAINING))


def many_layers(folder: Path, count: int) -> Path:
    """A network of ``count`` equal layers under the names of a transformer's."""
    weight = torch.randn(64, 64)
    names = [f"encoder.layer.{k}.attention.self.query.weight" for k in range(count)]
    return compressed(folder, {name: weight + 0.01 * k for k, name in enumerate(names)}, bond=8)


def rewritten(path: Path, manifest: Manifest) -> Path:
    """The same tensors under another manifest."""
    stored = open_safetensors(path, [path], None, strip=False)
    entries = [Entry(info, lambda name=name: stored.read(name)) for name, info in stored.infos.items()]  # type: ignore[misc]
    target = path.with_name(f"again.{path.name}")
    write_safetensors(target, entries, {"format": "pt", "mpoc": manifest.to_json()})
    return target


def changed(manifest: Manifest, **changes: Any) -> Manifest:
    """Every replaced layer's record changed."""
    layers = tuple(_changed(layer, changes) for layer in manifest.layers)
    return replace(manifest, layers=layers)


def _changed(layer: LayerRecord, changes: dict[str, Any]) -> LayerRecord:
    return layer if layer.form == "dense" else replace(layer, **changes)
