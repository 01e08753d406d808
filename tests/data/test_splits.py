from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.data import Data, TextOptions, hold_out, open_data
from mpoc.data.arrays import Arrays
from mpoc.data.base import Subset
from mpoc.data.text import TokenStream
from mpoc.errors import MpocError


def made(labels: list[int]) -> Data:
    x = torch.arange(len(labels))[:, None].float()
    names = tuple(map(str, range(max(labels) + 1)))
    return Data(Path("set"), "npz", "arrays", {"train": Arrays([x], torch.tensor(labels))}, names, (1,))


def rows(data: Data, split: str) -> list[int]:
    examples = data.splits[split]
    return examples.batch(range(len(examples)))["x"][:, 0].int().tolist()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=20, max_size=80), st.floats(0.1, 0.6), st.integers(0, 9))
def test_held_out_split_is_stratified(labels: list[int], share: float, seed: int) -> None:
    data = hold_out(made(labels), share, seed)
    kept, held = rows(data, "train"), rows(data, "validation")
    assert sorted(kept + held) == list(range(len(labels)))
    for label in set(labels):
        given_away = sum(labels[row] == label for row in held)
        count = labels.count(label)
        assert abs(given_away - count * share) <= 1
        assert given_away < count
    if min(labels.count(label) for label in set(labels)) > 4:
        assert len(held) == round(len(labels) * share)


def test_labels_follow_their_examples() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 50).tolist()
    data = hold_out(made(labels), 0.3, 0)
    for split in ("train", "validation"):
        y = data.splits[split].y
        assert y is not None
        assert y.tolist() == [labels[row] for row in rows(data, split)]
        assert data.splits[split].batch([3, 1])["y"].tolist() == [y[3], y[1]]


def test_split_is_seeded() -> None:
    data = made([0, 1] * 50)
    assert rows(hold_out(data, 0.2, 1), "validation") == rows(hold_out(data, 0.2, 1), "validation")
    assert rows(hold_out(data, 0.2, 1), "validation") != rows(hold_out(data, 0.2, 2), "validation")
    said = "no validation split: 0.2 of train held out (seed 1, by class)"
    assert hold_out(data, 0.2, 1).notes == (said,)


def test_holds_out_the_end_of_a_stream(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcde" * 40)
    data = hold_out(open_data(tmp_path / "a.txt", text=TextOptions(block=8)), 0.25, 0)
    train, validation = data.splits["train"], data.splits["validation"]
    assert isinstance(train, TokenStream)
    assert isinstance(validation, TokenStream)
    assert (len(train.tokens), len(validation.tokens)) == (150, 50)
    assert validation.batch([1])["input_ids"].tolist() == [[3, 4, 0, 1, 2, 3, 4, 0]]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1e-6])
def test_rejects_empty_splits(share: float) -> None:
    with pytest.raises(MpocError, match="leaves a split empty"):
        hold_out(made([0, 1] * 50), share, 0)


def test_rejects_data_with_a_validation_split() -> None:
    with pytest.raises(MpocError, match="nothing to hold out: it has the splits train, validation"):
        hold_out(hold_out(made([0, 1] * 50), 0.2, 0), 0.2, 0)


def test_subset_of_a_subset() -> None:
    data = made(list(range(10)))
    inner = Subset(Subset(data.splits["train"], torch.tensor([9, 4, 7, 1])), torch.tensor([2, 0]))
    assert inner.batch([0, 1])["y"].tolist() == [7, 9]
    assert (len(inner), inner.chunks()) == (2, None)
