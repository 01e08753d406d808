from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpoc.data import columns as rows
from mpoc.data import open_data
from mpoc.data.base import Subset
from mpoc.data.images import Decoder
from mpoc.errors import MpocError
from tests.data.samples import pixels, png, write_folder

LIMITS = pytest.mark.parametrize("limit", [1 << 30, 0])


def classes(*names: str, shape: tuple[int, ...] = (6, 5, 3), each: int = 3) -> dict[str, list[np.ndarray]]:
    return {name: list(pixels(each, *shape, seed=k)) for k, name in enumerate(names)}


@LIMITS
def test_infers_classes_from_folders(tmp_path: Path, limit: int) -> None:
    held = classes("cat", "ant", "dog")
    write_folder(tmp_path / "train", held)
    write_folder(tmp_path / "val", {"dog": held["dog"][:1]})
    (tmp_path / "train" / "dog" / "Thumbs.db").write_bytes(b"none")
    (tmp_path / "words.txt").write_text("beside the folders")
    data = open_data(tmp_path, limit=limit)
    assert (data.format, data.shape, data.classes) == ("image-folder", (3, 6, 5), ("ant", "cat", "dog"))
    assert [(split, len(examples)) for split, examples in data.splits.items()] == [
        ("train", 9),
        ("validation", 1),
    ]
    batch = data.splits["train"].batch([8, 0])
    np.testing.assert_array_equal(batch["x"][0].numpy(), held["dog"][2].transpose(2, 0, 1))
    np.testing.assert_array_equal(batch["x"][1].numpy(), held["ant"][0].transpose(2, 0, 1))
    assert batch["y"].tolist() == [2, 0]
    assert data.splits["validation"].batch([0])["y"].tolist() == [2]


def test_folders_without_splits_are_training_data(tmp_path: Path) -> None:
    data = open_data(write_folder(tmp_path / "set", classes("a", "b", shape=(4, 4))))
    assert list(data.splits) == ["train"]
    assert data.shape == (1, 4, 4)


@LIMITS
def test_mixed_colour_and_grey_become_colour(tmp_path: Path, limit: int) -> None:
    grey, colour = pixels(4, 4), pixels(4, 4, 3)
    data = open_data(write_folder(tmp_path / "set", {"a": [grey], "b": [colour]}), limit=limit)
    assert data.shape == (3, 4, 4)
    x = data.splits["train"].batch([0, 1])["x"].numpy()
    np.testing.assert_array_equal(x[0], np.stack([grey] * 3))
    np.testing.assert_array_equal(x[1], colour.transpose(2, 0, 1))
    assert data.notes == ("grey and colour images are mixed; all are read as RGB",)


@LIMITS
def test_rejects_differing_sizes_without_a_size_option(tmp_path: Path, limit: int) -> None:
    flat = np.full((8, 4, 3), 77, np.uint8)
    write_folder(tmp_path / "set", {"a": [pixels(4, 4, 3)], "b": [flat]})
    with pytest.raises(MpocError, match=r"b/000\.png: 8×4 pixels, but .*a/000\.png has 4×4") as caught:
        open_data(tmp_path / "set", limit=limit)
    assert "--image-size 4x4" in (caught.value.hint or "")
    data = open_data(tmp_path / "set", size=(6, 5), limit=limit)
    assert data.shape == (3, 6, 5)
    assert data.splits["train"].batch([1])["x"].unique().tolist() == [77]


def test_names_an_empty_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", classes("a", "b"))
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(MpocError, match=r"train/c: no image in this class folder"):
        open_data(tmp_path)


def test_rejects_classes_absent_from_training(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", classes("a", "b"))
    write_folder(tmp_path / "test", classes("a", "z"))
    with pytest.raises(MpocError, match=r"test/z: class 'z' is not a class of train"):
        open_data(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", None])
@LIMITS
def test_names_an_unreadable_image(tmp_path: Path, limit: int, content: bytes | None) -> None:
    write_folder(tmp_path / "train", classes("a", "b", each=1, shape=(40, 40, 3)))
    whole = png(pixels(40, 40, 3))
    (tmp_path / "train" / "b" / "bad.png").write_bytes(whole[:2000] if content is None else content)
    with pytest.raises(MpocError, match=r"train/b/bad\.png: (empty|not an image|damaged image)"):
        open_data(tmp_path, limit=limit).splits["train"].batch([2])


def test_rejects_16_bit_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", classes("a", each=1, shape=(4, 4)))
    Image.fromarray(pixels(4, 4).astype(np.uint16) * 256).save(tmp_path / "train" / "a" / "deep.png")
    with pytest.raises(MpocError, match=r"deep\.png: more than 8 bits per channel"):
        open_data(tmp_path)


def test_decodes_what_a_batch_asks_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "train", held := classes("a", "b", each=3))
    decoded: list[str] = []
    original = Decoder.decode

    def counted(decoder: Decoder, content: bytes, name: str) -> np.ndarray:
        decoded.append(name)
        return original(decoder, content, name)

    monkeypatch.setattr(Decoder, "decode", counted)
    train = open_data(tmp_path).splits["train"]
    expected = np.stack(held["a"] + held["b"]).transpose(0, 3, 1, 2)
    for places in ([4, 1, 4], [1, 0], [4]):
        np.testing.assert_array_equal(train.batch(places)["x"].numpy(), expected[places])
    assert len(decoded) == 3
    train.check()
    assert len(decoded) == len(set(decoded)) == 6


@LIMITS
def test_damage_is_told_before_a_training(tmp_path: Path, limit: int) -> None:
    write_folder(tmp_path / "train", classes("a", "b", each=1, shape=(40, 40, 3)))
    (tmp_path / "train" / "b" / "bad.png").write_bytes(png(pixels(40, 40, 3))[:2000])
    train = open_data(tmp_path, limit=limit).splits["train"]
    train.batch([0, 1])
    with pytest.raises(MpocError, match=r"train/b/bad\.png: damaged image") if limit else nullcontext():
        Subset(train, torch.tensor([0])).check()


def test_result_does_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = classes("a", "b", each=20)
    write_folder(tmp_path / "train", held)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 7)
    alone = open_data(tmp_path).splits["train"]
    try:
        torch.set_num_threads(3)
        together = open_data(tmp_path).splits["train"]
        together.check()
    finally:
        torch.set_num_threads(1)
    expected = np.stack(held["a"] + held["b"]).transpose(0, 3, 1, 2)
    for examples in (alone, together):
        np.testing.assert_array_equal(examples.batch(range(40))["x"].numpy(), expected)


def test_follows_linked_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "kept", {"a": [pixels(4, 4)], "b": [pixels(4, 4)]})
    (tmp_path / "set" / "train").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "set" / "train" / name).symlink_to(tmp_path / "kept" / name)
    data = open_data(tmp_path / "set")
    assert (data.format, len(data.splits["train"]), data.classes) == ("image-folder", 2, ("a", "b"))


def test_rejects_two_folders_of_one_split(tmp_path: Path) -> None:
    for split in ("train", "val", "valid"):
        write_folder(tmp_path / split, {"a": [pixels(4, 4)]})
    with pytest.raises(MpocError, match="val and valid are both validation"):
        open_data(tmp_path)
