"""The picture of entropies: what its axes say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mpoc.compression.entanglement import Entanglement, entanglement_of
from mpoc.reporting.plots import EntropyProfile, draw_entropies
from tests.support.checkpoints import mlp_state

matplotlib = pytest.importorskip("matplotlib")


def draw(found: Entanglement, picture: Path) -> None:
    draw_entropies([EntropyProfile(one.layer, one.weight, one.stored) for one in found.profiles], picture)


def texts(tmp_path: Path, sites: int) -> list[str]:
    """All that is written in the picture of a network's chains of so many sites."""
    torch.save(mlp_state(), tmp_path / "m.pt")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(entanglement_of(tmp_path / "m.pt", {"sites": sites}), tmp_path / "s.svg")
    return re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "s.svg").read_text("utf-8"))


def test_draws_one_line_per_layer(tmp_path: Path) -> None:
    assert texts(tmp_path, 3)[:3] == ["1", "2", "cut behind site k"]


def test_draws_single_cuts_as_points(tmp_path: Path) -> None:
    found = texts(tmp_path, 2)
    assert {"fc1", "fc2", "dense", "largest possible"} <= set(found)
    assert "cut behind site k" not in found


def test_omits_layers_of_one_site(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(7, 5)}, tmp_path / "m.pt")
    found = entanglement_of(tmp_path / "m.pt", {"min_params": 1})
    assert found.profiles[0].weight == ()
    draw(found, tmp_path / "s.svg")
    assert (tmp_path / "s.svg").is_file()
