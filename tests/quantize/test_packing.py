"""Packed codes: against Python's big integers and against compressed-tensors' layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpoc.quantize.packing import from_planes, pack, to_planes, unpack
from mpoc.quantize.storage import GRID_BITS

SHAPES = [(3, 1), (2, 31), (4, 32), (1, 33), (5, 97), (2, 128)]


def random_codes(bits: int, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


def as_big_integer(words: list[int]) -> int:
    return sum((word & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(words))


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_row_is_one_stream_of_bits(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(bits, shape)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (shape[0], -(-shape[1] * bits // 32))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        assert as_big_integer(words) == sum(code << (bits * k) for k, code in enumerate(row))
    assert torch.equal(unpack(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_layout_of_compressed_tensors(bits: int) -> None:
    """The packing loop of its first releases: signed values, offset, 32 // bits codes in a word."""
    codes = random_codes(bits, (6, 40))
    unsigned = (codes.long() - (1 << (bits - 1))) + (1 << (bits - 1))
    in_a_word = 32 // bits
    padded = torch.nn.functional.pad(unsigned, (0, -40 % in_a_word)).view(6, -1, in_a_word)
    expected = sum(padded[..., k] << (bits * k) for k in range(in_a_word))
    assert isinstance(expected, Tensor)
    assert torch.equal(pack(codes, bits), expected.to(torch.int32))


def test_packing_leaves_its_input() -> None:
    codes = random_codes(3, (2, 40))
    before = codes.clone()
    packed = pack(codes, 3)
    kept = packed.clone()
    unpack(packed, 3, 40)
    assert torch.equal(codes, before)
    assert torch.equal(packed, kept)


@pytest.mark.parametrize("bits", GRID_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planes_hold_the_codes_in_as_many_bits(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(bits, shape)
    planes = to_planes(codes, bits)
    assert torch.equal(from_planes(planes, bits, shape[1]), codes)
    assert planes.shape[1] < shape[1] * bits / 8 + 2
