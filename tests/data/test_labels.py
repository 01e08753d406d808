from __future__ import annotations

import numpy as np
import pytest
import torch

from mpoc.data.arrays import Column, Where, number_labels
from mpoc.errors import MpocError


def at(file: str) -> Where:
    return lambda row: f"{file}, row {row}"


def columns(**splits: Column) -> dict[str, tuple[Column, Where]]:
    return {split: (column, at(split)) for split, column in splits.items()}


def test_reads_integers_and_booleans() -> None:
    for dtype in (np.uint8, np.int16, np.int64, np.bool_):
        labels, classes, notes = number_labels(columns(train=np.array([1, 0, 1], dtype)))
        assert labels["train"].dtype == torch.int64
        assert (labels["train"].tolist(), classes, notes) == ([1, 0, 1], ("0", "1"), [])
    assert number_labels(columns(train=np.array([[1], [0]])))[0]["train"].tolist() == [1, 0]


def test_reports_gaps_per_split() -> None:
    _, classes, notes = number_labels(columns(train=np.array([0, 5, 2]), test=np.array([0, 1, 2, 3, 4, 5])))
    assert len(classes) == 6
    assert notes == ["train: no example of 3 of 6 classes (1, 3, 4)"]


def test_numbers_words_by_the_training_split() -> None:
    found = columns(test=np.array(["dog", "ant"]), train=np.array(["cat", "ant", "dog", "cat"]))
    labels, classes, _ = number_labels(found)
    assert classes == ("ant", "cat", "dog")
    assert labels["test"].tolist() == [2, 0]
    assert labels["train"].tolist() == [1, 0, 2, 1]
    with pytest.raises(MpocError, match="test, row 1: label 'eel' is not a class of the set"):
        number_labels(columns(test=np.array(["dog", "eel"]), train=np.array(["dog", "cat"])))


def test_counts_bad_rows() -> None:
    with pytest.raises(MpocError, match=r"train, row 1: label -1 is negative \(2 such rows\)"):
        number_labels(columns(train=np.array([0, -1, 2, -1])))


def test_rejects_splits_of_different_kinds() -> None:
    with pytest.raises(MpocError, match="labels of different kinds in the splits: integers, targets"):
        number_labels(columns(train=np.array([0, 1]), test=np.array([0.5, 1.0])))


def test_rejects_other_types() -> None:
    with pytest.raises(MpocError, match="train, row 0: labels of type complex128"):
        number_labels(columns(train=np.array([1j])))


def test_handles_empty_labels() -> None:
    assert number_labels({}) == ({}, (), [])
