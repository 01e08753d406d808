"""Encoded images (PNG, JPEG, …): decoded once where they fit in memory, else batch by batch."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.data.arrays import Arrays
from mpoc.data.base import Batch, Data, Examples, Source
from mpoc.data.labels import Column, Where, number_labels
from mpoc.data.rows import Rows
from mpoc.errors import MpocError

_GREY = ("1", "L", "LA")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than eight bits a channel
# What pillow's decoders raise on bytes that are not what they should be.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


class _ColourFoundError(Exception):
    """A set taken for grey has a colour image in it."""


@dataclass(frozen=True)
class Decoder:
    """Turns encoded bytes into uint8 pixels of one shape."""

    shape: tuple[int, int, int]  # (C, H, W), C 1 or 3
    resize: bool  # to H×W; else an image of another size is an error
    first: str  # the image that gave the shape, for messages

    def decode(self, content: bytes, name: str) -> NDArray[np.uint8]:
        """(C, H, W) uint8.

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
            raise MpocError(f"{name}: a damaged image ({error})") from error
        return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)

    def check(self, image: Any, name: str) -> None:
        """Raise MpocError for an image that is not of this shape; only its header is looked at."""
        channels, height, width = self.shape
        if image.mode in _DEEP:
            raise MpocError(f"{name}: more than 8 bits a channel (mode {image.mode})", "save it with 8 bits")
        if not self.resize and image.size != (width, height):
            raise MpocError(
                f"{name}: {image.height}×{image.width} pixels, but {self.first} has {height}×{width}",
                f"resize all while reading: --size {height}x{width}",
            )
        if channels == 1 and image.mode not in _GREY:
            raise _ColourFoundError


class EncodedImages(Examples):
    """Images that are decoded when a batch asks for them."""

    def __init__(self, rows: Rows[bytes], decoder: Decoder, y: Tensor | None) -> None:
        self.rows = rows
        self.decoder = decoder
        self.y = y

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``x`` (n, C, H, W) uint8, decoded now, and ``y``."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        places = chosen.tolist()
        x = np.empty((len(places), *self.decoder.shape), np.uint8)
        for k, (place, content) in enumerate(zip(places, self.rows.take(places), strict=True)):
            x[k] = self.decoder.decode(content, self.rows.name(place))
        return {"x": torch.from_numpy(x)} | ({} if self.y is None else {"y": self.y[chosen]})

    def chunks(self) -> Tensor | None:
        """Those of the file."""
        return self.rows.chunks()


def assemble_images(
    source: Source,
    form: str,
    rows: dict[str, Rows[bytes]],
    columns: dict[str, tuple[Column, Where]],
    names: tuple[str, ...],
) -> Data:
    """A checked data set of encoded images; ``columns`` are the labels of each split.

    Every image is decoded, or where the set is too large for memory its header is read: its size and
    colour are certain then, and damage further on is met, and named, when the image is decoded.

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
        notes.append("grey and colour images are mixed: all are read as RGB")
        decoder = Decoder((3, *decoder.shape[1:]), decoder.resize, decoder.first)
        splits = _read_splits(rows, decoder, labels, source.limit)
    return Data(source.path, form, "images", splits, classes, decoder.shape, (*source.notes, *notes))


def _decoder_for(rows: Rows[bytes], size: tuple[int, int] | None) -> Decoder:
    """The first image gives the shape."""
    image = _open(rows.take([0])[0], rows.name(0))
    channels = 1 if image.mode in _GREY else 3
    return Decoder((channels, *(size or (image.height, image.width))), size is not None, rows.name(0))


def _read_splits(
    rows: dict[str, Rows[bytes]], decoder: Decoder, labels: dict[str, Tensor], limit: int
) -> dict[str, Examples]:
    total = sum(len(held) for held in rows.values()) * int(np.prod(decoder.shape))
    splits: dict[str, Examples] = {}
    for split, held in rows.items():
        if total <= limit:
            splits[split] = Arrays([_decode_all(held, decoder)], labels.get(split))
        else:
            _for_all(held, lambda _, content, name: decoder.check(_open(content, name), name))
            splits[split] = EncodedImages(held, decoder, labels.get(split))
    return splits


def _decode_all(rows: Rows[bytes], decoder: Decoder) -> Tensor:
    """(n, C, H, W) uint8."""
    pixels = np.empty((len(rows), *decoder.shape), np.uint8)

    def fill(index: int, content: bytes, name: str) -> None:
        pixels[index] = decoder.decode(content, name)

    _for_all(rows, fill)
    return torch.from_numpy(pixels)


def _for_all(rows: Rows[bytes], work: Callable[[int, bytes, str], None]) -> None:
    """``work`` on every (index, value, name), on as many threads as torch has: pillow frees the GIL."""
    start = 0
    threads = torch.get_num_threads()

    def piece(part: list[tuple[int, bytes]]) -> None:
        for index, content in part:
            work(index, content, rows.name(index))

    with ThreadPoolExecutor(threads) as pool:
        for values in rows.scan():
            numbered = list(enumerate(values, start))
            step = -(-len(numbered) // threads)
            parts = [numbered[k : k + step] for k in range(0, len(numbered), step)]
            list(pool.map(piece, parts))  # the list waits, and raises what the first failing part raised
            start += len(values)


@cache
def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MpocError("reading images needs pillow", "pip install 'mpoc[train]'") from error
    return Image


def _open(content: bytes, name: str) -> Any:
    """A pillow image of which only the header has been read."""
    pillow = _pillow()
    try:
        return pillow.open(BytesIO(content))
    except (*_BROKEN, pillow.DecompressionBombError) as error:
        reason = "empty" if not content else "not an image, or a damaged one"
        raise MpocError(f"{name}: {reason}") from error
