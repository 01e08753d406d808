from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mpoc.data import ImageOptions, prepare_images
from mpoc.data.images import _shape_of
from mpoc.errors import UsageError
from tests.data.samples import pixels


def images(*shape: int) -> torch.Tensor:
    return torch.from_numpy(pixels(*shape))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalises_by_the_formula() -> None:
    x = images(4, 3, 5, 6)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (x.numpy() / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    found = prepare_images(x, ImageOptions(mean, std))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    one = prepare_images(x, ImageOptions((0.5,), (0.25,)))
    torch.testing.assert_close(one, (x / 255 - 0.5) / 0.25)


def test_caches_mean_and_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    x, options = images(4, 3, 5, 6), ImageOptions((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    first = prepare_images(x, options)
    other = prepare_images(x, ImageOptions((0.1, 0.2, 0.4), (0.4, 0.5, 0.6)))
    assert not torch.equal(other, first)
    monkeypatch.delattr(torch, "tensor")
    assert torch.equal(prepare_images(x, options), first)


def test_crops_and_flips_the_padded_image() -> None:
    x = images(64, 2, 4, 5)
    before = x.clone()
    found = (prepare_images(x, ImageOptions(pad=2, flip=True), generator()) * 255).round().to(torch.uint8)
    padded = F.pad(x, (2, 2, 2, 2))
    seen = set()
    for image, source in zip(found, padded, strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, source[:, top : top + 4, left : left + 5])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert any(top != left for top, left, _ in seen)
    assert {flip for _, _, flip in seen} == {False, True}
    assert torch.equal(x, before)


def test_augmentation_is_seeded_and_off_in_evaluation() -> None:
    x = images(32, 1, 6, 6)
    options = ImageOptions(pad=2, flip=True)
    assert torch.equal(prepare_images(x, options, generator(1)), prepare_images(x, options, generator(1)))
    assert not torch.equal(prepare_images(x, options, generator(1)), prepare_images(x, options, generator(2)))
    torch.testing.assert_close(prepare_images(x, options), x / 255)


def test_resizes_like_pillow() -> None:
    x = images(2, 3, 16, 12)
    options = ImageOptions(size=(8, 6))
    found = prepare_images(x, options) * 255
    for image, source in zip(found, x, strict=True):
        pillow = Image.fromarray(source.permute(1, 2, 0).numpy()).resize((6, 8), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).float()
        assert float((image - expected).abs().max()) <= 1.01  # pillow rounds twice
    assert options.output_shape((3, 16, 12)) == (3, 8, 6)
    assert ImageOptions().output_shape((3, 16, 12)) == (3, 16, 12)


def test_options_round_trip_json() -> None:
    options = ImageOptions((0.1, 0.2, 0.3), (1.0, 1.0, 2.0), 4, True, (32, 32))
    assert ImageOptions(**json.loads(json.dumps(options.as_dict()))) == options


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (0.1, 0.2), "std": (1.0, 1.0, 1.0)},
        {"std": (0.0,)},
        {"std": (float("nan"),)},
        {"mean": (float("inf"),)},
        {"std": ()},
        {"pad": -1},
        {"size": (0, 4)},
        {"size": (4,)},
    ],
)
def test_rejects_options_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ImageOptions(**wrong)  # type: ignore[arg-type]


def test_rejects_means_for_other_channels() -> None:
    with pytest.raises(UsageError, match="3 means for images of 1 channels"):
        prepare_images(images(2, 1, 4, 4), ImageOptions((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("form", "mode", "channels"),
    [
        *(("JPEG", mode, channels) for mode, channels in (("L", 1), ("RGB", 3), ("CMYK", None))),
        *(("PNG", mode, 1) for mode in ("1", "L", "LA")),
        *(("PNG", mode, 3) for mode in ("RGB", "RGBA")),
        *(("PNG", mode, None) for mode in ("P", "I;16")),
        ("GIF", "L", None),
    ],
)
def test_shape_in_the_header_is_pillows(form: str, mode: str, channels: int | None) -> None:
    file = BytesIO()
    Image.new(mode, (7, 5)).save(file, form)
    content = file.getvalue()
    assert _shape_of(content) == (None if channels is None else (channels, 5, 7))
    assert all(_shape_of(content[:size]) is None for size in range(len(content)))  # cut short
    assert all(_shape_of(content[:size] + content[-8:]) is None for size in range(20))
