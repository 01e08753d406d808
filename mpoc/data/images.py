"""Images: decode PNG, JPEG and the like, read image folders, and turn stored pixels into a network's input.

Encoded images are decoded when they are asked for, and kept where the set fits in memory.  Preprocessing
(resize, pad-crop-flip, normalise) works on a whole batch.  An image folder has one folder per class and one
file per image: ``train/<class>/*``, ``test/<class>/*``, or ``<class>/*`` alone.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mpoc.data.arrays import Column, Where, number_labels
from mpoc.data.base import Batch, Data, DataSource, Examples
from mpoc.data.columns import FileRows, HeldRows, Rows
from mpoc.data.recognise import IMAGE_SUFFIXES, SPLITS
from mpoc.errors import MpocError, UsageError

_GREY = ("1", "L", "LA")
_AT_ONCE = 4096  # images that are decoded together
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than eight bits a channel
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a JPEG that its size follows
# What pillow's decoders raise on damaged bytes.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True)
class ImageOptions:
    """The preprocessing of images, as plain data that can be recorded. Lists become tuples."""

    mean: tuple[float, ...] = (0.0,)  # per channel, or one for all; pixels in [0, 1]
    std: tuple[float, ...] = (1.0,)
    pad: int = 0  # training: pad by this many black pixels, then crop at a random place
    flip: bool = False  # training: mirror left and right, every second image on average
    size: tuple[int, int] | None = None  # (height, width) to resize to; None: as they are

    def __post_init__(self) -> None:
        for name in ("mean", "std", "size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise UsageError(f"{len(self.mean)} means but {len(self.std)} standard deviations")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise UsageError(f"means {self.mean}, standard deviations {self.std}: must be finite")
        if not self.mean or not self.std or min(self.std) <= 0:
            raise UsageError(
                f"standard deviations {self.std}: each must be above 0, one per channel or one for all"
            )
        if self.pad < 0 or (self.size is not None and (len(self.size) != 2 or min(self.size) < 1)):
            raise UsageError(
                f"pad {self.pad}, size {self.size}: pad must be at least 0, each side at least 1"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain data; ``ImageOptions(**options.as_dict())`` equals ``options``."""
        return asdict(self)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The (C, H, W) that :func:`prepare_images` gives for (C, H, W)."""
        return (shape[0], *self.size) if self.size else tuple(shape)


def prepare_images(x: Tensor, options: ImageOptions, generator: torch.Generator | None = None) -> Tensor:
    """Preprocess a batch of images for the network.

    Args:
        x: (n, C, H, W) uint8.
        options: the preprocessing.
        generator: draws the random crops and flips of training; None for evaluation, without any.

    Returns:
        (n, C, H', W') float32, (pixel/255 − mean)/std, on the device of x.

    Raises:
        UsageError: the number of means or standard deviations is neither one nor the number of channels.
    """
    channels = x.shape[1]
    for name, values in (("means", options.mean), ("standard deviations", options.std)):
        if len(values) not in (1, channels):
            raise UsageError(f"{len(values)} {name} for images of {channels} channels")
    if options.size and tuple(x.shape[2:]) != options.size:
        x = F.interpolate(x.float(), options.size, mode="bilinear", antialias=True)
    if generator is not None and options.pad:
        x = _crop(x, options.pad, generator)
    if generator is not None and options.flip:
        flips = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
        x = torch.where(flips.to(x.device)[:, None, None, None], x.flip(3), x)
    mean, std = _planes(options.mean, x.device), _planes(options.std, x.device)
    return x.float().div_(255).sub_(mean).div_(std) if x.dtype == torch.uint8 else (x / 255 - mean) / std


@lru_cache(maxsize=16)
def _planes(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) float32; cached, as every batch needs the same."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _crop(x: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Pad each image with zeros on all sides, then crop it to its size at a random place."""
    n, _, height, width = x.shape
    places = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=generator.device).to(x.device)
    windows = (
        F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    )  # (n, C, 2p+1, 2p+1, H, W), a view
    return windows[torch.arange(n, device=x.device), :, places[0], places[1]]


class _ColourFoundError(Exception):
    """A colour image in a set whose first image is grey."""


@dataclass(frozen=True)
class Decoder:
    """Decodes images to uint8 pixels of one shape."""

    shape: tuple[int, int, int]  # (C, H, W), C 1 or 3
    resize: bool  # to H×W; where False an image of another size is an error
    first: str  # the image that gave the shape, for messages

    def decode(self, content: bytes, name: str) -> NDArray[np.uint8]:
        """Decode one image to (C, H, W) uint8.

        Raises:
            MpocError: not an image, damaged, or of another size.
        """
        channels, height, width = self.shape
        image = _open(content, name)
        self.check(image, name)
        try:
            if image.mode != "RGB" or channels == 1:
                if "transparency" in image.info:
                    image = image.convert("RGBA")
                image = image.convert("L" if channels == 1 else "RGB")
            if self.resize and image.size != (width, height):
                image = image.resize((width, height), _pillow().Resampling.BILINEAR)
            pixels = np.asarray(image)
        except _BROKEN as error:
            raise MpocError(f"{name}: damaged image ({error})") from error
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)

    def check(self, image: Any, name: str) -> None:
        """Check the shape in the header of a pillow image.

        Raises:
            MpocError: another size, or more than 8 bits per channel.
        """
        channels, height, width = self.shape
        if image.mode in _DEEP:
            raise MpocError(
                f"{name}: more than 8 bits per channel (mode {image.mode})", "save it with 8 bits"
            )
        if not self.resize and image.size != (width, height):
            raise MpocError(
                f"{name}: {image.height}×{image.width} pixels, but {self.first} has {height}×{width}",
                f"resize all images: --image-size {height}x{width}",
            )
        if channels == 1 and image.mode not in _GREY:
            raise _ColourFoundError


class EncodedImages(Examples):
    """Images decoded when a batch asks for them."""

    def __init__(self, rows: Rows[bytes], decoder: Decoder, y: Tensor | None) -> None:
        self.rows = rows
        self.decoder = decoder
        self.y = y

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``x`` (n, C, H, W) uint8, and ``y``."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        x = torch.from_numpy(self._pixels(chosen.numpy()))
        return {"x": x} | ({} if self.y is None else {"y": self.y[chosen]})

    def chunks(self) -> Tensor | None:
        """(n,) the chunk of the file that holds each image, or None."""
        return self.rows.chunks()

    def _pixels(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, C, H, W), decoded on as many threads as torch has: pillow frees the GIL."""
        x = np.empty((len(places), *self.decoder.shape), np.uint8)
        items = [*enumerate(zip(places.tolist(), self.rows.take(places.tolist()), strict=True))]
        threads = torch.get_num_threads()

        def fill(first: int) -> None:
            for k, (place, content) in items[first::threads]:
                x[k] = self.decoder.decode(content, self.rows.name(place))

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(threads)))  # waits, and raises the first error
        return x


class KeptImages(EncodedImages):
    """Images that stay in memory: encoded until a batch asks for them, decoded from then on."""

    rows: HeldRows

    def __init__(self, rows: HeldRows, decoder: Decoder, y: Tensor | None) -> None:
        super().__init__(rows, decoder, y)
        self._kept = np.empty((len(rows), *decoder.shape), np.uint8)  # memory that is taken when filled
        self._decoded = np.zeros(len(rows), bool)

    def check(self) -> None:
        """Decode all images.

        Raises:
            MpocError: one is damaged.
        """
        self._pixels(np.arange(len(self)))

    def _pixels(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        missing = np.unique(places[~self._decoded[places]])
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            self._kept[part] = super()._pixels(part)
            self._decoded[part] = True
            self.rows.drop(part.tolist())
        return self._kept[places]


def assemble_images(
    source: DataSource,
    form: str,
    rows: dict[str, Rows[bytes]],
    columns: dict[str, tuple[Column, Where]],
    names: tuple[str, ...],
) -> Data:
    """A checked data set of encoded images; ``columns`` are the labels of each split.

    Every header is read, which gives size and colour.  Damage beyond it is reported when the image is
    decoded: by :meth:`Examples.check`, or in a batch.

    Raises:
        MpocError: pillow is missing, no examples, a damaged image, images of different sizes, a bad label.
    """
    for split, held in rows.items():
        if len(held) == 0:
            raise MpocError(f"{source.files[split][0]}: no examples")
    labels, classes, notes = number_labels(columns, names)
    decoder = _decoder_for(next(iter(rows.values())), source.size)
    try:
        splits = _read_splits(rows, decoder, labels, source.limit)
    except _ColourFoundError:
        notes.append("grey and colour images are mixed; all are read as RGB")
        decoder = Decoder((3, *decoder.shape[1:]), decoder.resize, decoder.first)
        splits = _read_splits(rows, decoder, labels, source.limit)
    return Data(source.path, form, "images", splits, classes, decoder.shape, (*source.notes, *notes))


def _decoder_for(rows: Rows[bytes], size: tuple[int, int] | None) -> Decoder:
    """The decoder for the shape of the first image."""
    image = _open(rows.take([0])[0], rows.name(0))
    channels = 1 if image.mode in _GREY else 3
    return Decoder((channels, *(size or (image.height, image.width))), size is not None, rows.name(0))


def _read_splits(
    rows: dict[str, Rows[bytes]], decoder: Decoder, labels: dict[str, Tensor], limit: int
) -> dict[str, Examples]:
    keeps = sum(len(held) for held in rows.values()) * int(np.prod(decoder.shape)) <= limit
    splits: dict[str, Examples] = {}
    for split, held in rows.items():
        encoded: list[bytes] = []
        for start, values in _checked(held, decoder):
            encoded[start:] = values if keeps else []
        kept = KeptImages(HeldRows(held, encoded), decoder, labels.get(split)) if keeps else None
        splits[split] = kept or EncodedImages(held, decoder, labels.get(split))
    return splits


def _checked(rows: Rows[bytes], decoder: Decoder) -> Iterator[tuple[int, list[bytes]]]:
    """All values, some at a time, with the place of the first of them; their headers are right."""
    start, shape = 0, decoder.shape
    alike = () if decoder.resize else {(1, *shape[1:]), shape}  # pillow takes far longer to open an image
    for values in rows.scan():
        for place, content in enumerate(values, start):
            if _shape_of(content) not in alike:
                decoder.check(_open(content, rows.name(place)), rows.name(place))
        yield start, values
        start += len(values)


@cache
def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MpocError("reading images needs pillow", "pip install 'mpoc[train]'") from error
    return Image


def _shape_of(content: bytes) -> tuple[int, int, int] | None:
    """The (C, H, W) in the header of a whole JPEG or PNG of 8 bits, C without alpha; None of any other."""
    is_png = content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] + content[-8:-4] == b"IHDRIEND"
    if is_png and len(content) > 40:
        width, height, depth, colour = struct.unpack_from(">IIBB", content, 16)
        channels = {0: 1, 2: 3, 4: 1, 6: 3}.get(colour)
        return (channels, height, width) if channels and depth <= 8 else None
    at = 2 if content[:2] == b"\xff\xd8" and content[-2:] == b"\xff\xd9" else len(content)
    while content[at : at + 1] == b"\xff" and at + 10 <= len(content):
        if content[at + 1] in _FRAMES:
            depth, height, width, channels = struct.unpack_from(">BHHB", content, at + 4)
            return (channels, height, width) if channels in (1, 3) and depth == 8 else None
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return None


def _open(content: bytes, name: str) -> Any:
    """A pillow image; only its header has been read."""
    pillow = _pillow()
    try:
        return pillow.open(BytesIO(content))
    except (*_BROKEN, pillow.DecompressionBombError) as error:
        reason = "empty" if not content else "not an image, or a damaged one"
        raise MpocError(f"{name}: {reason}") from error


def open_image_folder(source: DataSource) -> Data:
    """Open a folder of images; the classes are the names of the training folders, sorted.

    Raises:
        MpocError: no class folders, an empty one, a class that training lacks, or a bad image.
    """
    folders = {split: class_folders(held[0]) for split, held in source.files.items()}
    first = next(split for split in SPLITS if split in folders)
    names = tuple(sorted(folders[first]))
    rows: dict[str, Rows[bytes]] = {}
    columns: dict[str, tuple[Column, Where]] = {}
    for split, classes in folders.items():
        unknown = sorted(classes.keys() - set(names))
        if unknown:
            raise MpocError(
                f"{classes[unknown[0]][0].parent}: class {unknown[0]!r} is not a class of {first}"
            )
        held = FileRows([file for name in sorted(classes) for file in classes[name]])
        numbers = [names.index(name) for name in sorted(classes)]
        labels = np.repeat(np.array(numbers), [len(classes[name]) for name in sorted(classes)])
        rows[split], columns[split] = held, (labels, held.name)
    return assemble_images(source, "image-folder", rows, columns, names)


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Class → its image files, sorted, with those of nested folders.

    Raises:
        MpocError: not a folder, no class folders, or an empty one.
    """
    classes = {}
    if not folder.is_dir():
        raise MpocError(f"{folder}: not a folder", "name the folder that holds train/ or the class folders")
    for inner in sorted(folder.iterdir()):
        if not inner.is_dir() or inner.name.startswith("."):
            continue
        files = [
            file for file in inner.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        ]
        if not files:
            raise MpocError(f"{inner}: no image in this class folder", "add images, or remove the folder")
        classes[inner.name] = sorted(files)
    if not classes:
        raise MpocError(f"{folder}: no class folders", "one folder per class: train/<class>/*.png")
    return classes
