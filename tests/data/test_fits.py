from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpoc.data import Data, ImageOptions, TextOptions, check_fits, open_data
from mpoc.errors import MpocError
from tests.data.samples import pixels


def made(folder: Path, **arrays: np.ndarray) -> Data:
    np.savez(folder / "m.npz", **arrays)  # type: ignore[arg-type]
    return open_data(folder / "m.npz")


def test_accepts_fitting_data(tmp_path: Path) -> None:
    data = made(tmp_path, x=pixels(3, 28, 28), y=np.array([0, 9, 4]))
    check_fits(data, 10, (1, 28, 28))
    check_fits(data, 12, None)
    check_fits(data, None, (1, 32, 32), images=ImageOptions(size=(32, 32)))


def test_rejects_labels_beyond_the_classes(tmp_path: Path) -> None:
    data = made(tmp_path, x=pixels(3, 28, 28), y=np.array([0, 9, 10]))
    said = r"m\.npz: label 10 \(class '10'; train, example 2\) is out of range for a network of 10 classes"
    with pytest.raises(MpocError, match=said) as caught:
        check_fits(data, 10, None)
    assert "give the network the 11 classes" in (caught.value.hint or "")


def test_rejects_images_of_another_size(tmp_path: Path) -> None:
    data = made(tmp_path, x=pixels(3, 28, 28), y=np.array([0, 1, 2]))
    with pytest.raises(MpocError, match="examples are 1×28×28, but the network takes 1×32×32") as caught:
        check_fits(data, 10, (1, 32, 32))
    assert caught.value.hint == "resize: --image-size 32x32"
    with pytest.raises(MpocError, match="1×28×28, but the network takes 3×28×28") as caught:
        check_fits(data, 10, (3, 28, 28))
    assert caught.value.hint is None
    with pytest.raises(MpocError, match="1×32×32, but the network takes 1×28×28"):
        check_fits(data, 10, (1, 28, 28), images=ImageOptions(size=(32, 32)))


def test_rejects_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(MpocError, match="train has no labels, but the network has 10 classes"):
        check_fits(made(tmp_path, x=pixels(3, 28, 28)), 10, None)
    with pytest.raises(MpocError, match="train has regression targets, not labels"):
        check_fits(made(tmp_path, x=pixels(3, 28, 28), y=np.zeros(3)), 10, None)


def test_rejects_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcde" * 40)
    data = open_data(tmp_path / "a.txt", text=TextOptions(block=4))
    check_fits(data, vocabulary=5)
    with pytest.raises(MpocError, match="its tokenizer has 5 tokens, but the network 4"):
        check_fits(data, vocabulary=4)
