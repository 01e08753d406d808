"""Which output counts, and how vectors are pooled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mpoc.compression.calibrate.output_of_interest import Pooling, direction, output_of_interest, read_pooling
from mpoc.errors import MpocError
from tests.compression.calibrate.networks import encoder, texts


def folder(path: Path, kinds: tuple[str, ...] = ("Transformer", "Pooling"), **modes: bool) -> Path:
    """A directory as sentence-transformers writes it."""
    modules = [
        {"idx": k, "path": f"{k}_{kind}" if k else "", "type": f"sentence_transformers.models.{kind}"}
        for k, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 16, **{f"pooling_mode_{key}": on for key, on in modes.items()}}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return path


def test_reads_pooling_from_a_directory(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    folder(tmp_path, ("Transformer", "Pooling", "Normalize"), cls_token=False, mean_tokens=True)
    assert read_pooling(tmp_path) == Pooling("mean", normalize=True)


def test_first_token_pooling(tmp_path: Path) -> None:
    assert read_pooling(folder(tmp_path, cls_token=True)) == Pooling("cls", normalize=False)


def test_unknown_pooling_is_none(tmp_path: Path) -> None:
    assert read_pooling(folder(tmp_path, max_tokens=True)) is None
    (tmp_path / "other").mkdir()
    kinds = ("Transformer", "Pooling", "Dense")
    assert read_pooling(folder(tmp_path / "other", kinds, mean_tokens=True)) is None


def test_rejects_unreadable_configuration(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(MpocError, match=r"modules\.json: cannot be read"):
        read_pooling(tmp_path)


def test_pooling() -> None:
    states, batch = torch.randn(3, 9, 16), texts()
    mean = torch.stack([states[k, :length].mean(0) for k, length in enumerate((9, 4, 6))])
    assert torch.allclose(Pooling("mean", False)(states, batch), mean, atol=1e-6)
    normed = mean / mean.norm(dim=1, keepdim=True)
    assert torch.allclose(Pooling("mean", True)(states, batch), normed, atol=1e-6)
    assert torch.equal(Pooling("cls", False)(states, batch), states[:, 0])
    behind = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    assert torch.equal(Pooling("cls", False)(states, behind)[1], states[1, 5])


def test_outputs() -> None:
    batch = texts()
    hidden = encoder(1)(**batch)
    assert output_of_interest(hidden, batch)[0].shape == (19, 16)
    assert output_of_interest(hidden, batch)[1] is False
    assert output_of_interest(hidden, batch, Pooling("mean", True))[0].shape == (3, 16)
    scores, are_logits = output_of_interest(torch.randn(3, 9, 50), batch)
    assert scores.shape == (19, 50) and are_logits
    for outputs, batch, wanted in (
        (torch.randn(3, 5), {"x": torch.randn(3, 4)}, True),
        (torch.randn(3, 1), {"x": torch.randn(3, 4)}, False),
        (torch.randn(3, 2), {"x": torch.randn(3, 4), "y": torch.randn(3, 2)}, False),
        (torch.randn(3, 5, 2, 2), {"x": torch.randn(3, 4)}, False),
    ):
        assert output_of_interest(outputs, batch)[1] is wanted


def test_directions() -> None:
    values = torch.randn(50, 4)
    signs = direction(values, False, torch.Generator().manual_seed(0))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    drawn = direction(values, True, torch.Generator().manual_seed(0))
    labels = drawn.argmax(1)
    wanted = nn.functional.one_hot(labels, 4) - values.softmax(1)
    assert torch.allclose(drawn, wanted, atol=1e-6)
    assert len(labels.unique()) == 4
