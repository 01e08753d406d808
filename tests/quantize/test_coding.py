"""Entropy-coded streams: lossless, close to the entropy, predicted, and refused where they are damaged."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.quantize.coding import decode, encode, entropy_bits

SOME = settings(max_examples=40, deadline=None, derandomize=True)
SPREADS = [8.0, 4.0, 2.0, 1.0, 0.6, 0.35]


def gaussian(shape: tuple[int, int], spread: float, by_column: float = 0.0) -> Tensor:
    """Codes of a normal matrix whose columns differ in spread by a factor e^(± by_column)."""
    generator = torch.Generator().manual_seed(round(100 * spread))
    columns = torch.exp(by_column * torch.randn(shape[1], generator=generator))
    return (spread * columns * torch.randn(shape, generator=generator)).round().to(torch.int32)


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int8)


def coded(codes: Tensor) -> Tensor:
    return encode(codes, zeros(codes.shape[0]), zeros(codes.shape[1]), 0.5)


def entropy(codes: Tensor) -> float:
    """Order-0 entropy in bits a code."""
    shares = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    return float(-(shares * np.log2(shares)).sum())


@SOME
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
    reach=st.sampled_from([0, 1, 3, 100, 40_000, 2**31 - 1]),
    share=st.sampled_from([0.01, 0.2, 1.0]),
)
def test_decoding_undoes_encoding(rows: int, columns: int, seed: int, reach: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(-reach, reach + 1, (rows, columns)) * (
        generator.random((rows, columns)) < share
    )
    exponents = generator.integers(0, 16, rows), generator.integers(0, 16, columns)
    scale = float(np.float32(generator.random() + 1e-6))
    by_row, by_column = map(torch.from_numpy, exponents)
    stream = encode(torch.from_numpy(codes), by_row, by_column, scale)
    decoded, row_exponents, column_exponents, same_scale = decode(stream, rows, columns)
    assert np.array_equal(decoded.numpy(), codes)
    assert np.array_equal(row_exponents.numpy(), exponents[0])
    assert np.array_equal(column_exponents.numpy(), exponents[1])
    assert same_scale == scale
    largest = max(-int(codes.min()) - 1, int(codes.max()), 0)
    expected = torch.int8 if largest < 1 << 7 else torch.int16 if largest < 1 << 15 else torch.int32
    assert decoded.dtype == expected


@pytest.mark.parametrize("spread", SPREADS)
def test_size_is_near_the_entropy(spread: float) -> None:
    codes = gaussian((256, 384), spread)
    assert 8 * coded(codes).numel() / codes.numel() < entropy(codes) + 0.06


def test_few_nonzeros_take_little() -> None:
    codes = gaussian((256, 384), 0.2)
    assert 8 * coded(codes).numel() / codes.numel() < 1.5 * entropy(codes)
    for shape in ((384, 512), (1024, 4096)):
        zeroes = torch.zeros(shape, dtype=torch.int8)
        stream = coded(zeroes)
        assert stream.numel() < 60 + zeroes.numel() / 4000
        assert torch.equal(decode(stream, *shape)[0], zeroes)


@pytest.mark.parametrize("transposed", [False, True])
def test_classes_follow_the_spread_of_lines(transposed: bool) -> None:
    """Columns or rows of different spread cost the mean of their entropies, not that of the mixture."""
    codes = gaussian((256, 256), 2.0, by_column=1.0)
    by_column = sum(entropy(column) for column in codes.T) / 256
    stream = coded(codes.T.contiguous() if transposed else codes)
    assert 8 * stream.numel() / codes.numel() < by_column + 0.2 < entropy(codes)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("by_column", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(64, 288), (256, 384)])
def test_prediction_is_within_two_per_cent(shape: tuple[int, int], spread: float, by_column: float) -> None:
    codes = gaussian(shape, spread, by_column)
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(0, 6, (size,), generator=generator) for size in shape)
    stream = encode(codes, rows, columns, 1.0)
    assert entropy_bits(codes, rows, columns) == pytest.approx(8 * stream.numel(), rel=0.02)


def test_classes_follow_rows_and_columns_together() -> None:
    """Codes that spread by row times column cost about what their own normal distributions would."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.exp2(torch.rand(256, generator=generator) * 3) for _ in range(2))
    spread = rows[:, None] * columns
    codes = (spread * torch.randn(256, 256, generator=generator)).round().to(torch.int32)
    own = float((spread * (2 * torch.pi * torch.e) ** 0.5).log2().mean())
    assert 8 * coded(codes).numel() / codes.numel() < own + 0.25 < entropy(codes)


def test_coding_is_deterministic_and_leaves_its_input() -> None:
    codes = gaussian((50, 60), 3.0)
    before = codes.clone()
    assert torch.equal(coded(codes), coded(codes))
    assert torch.equal(codes, before)


def test_rejects_a_stream_cut_short_or_lengthened() -> None:
    stream = coded(gaussian((16, 24), 1.0))
    for length in range(stream.numel()):
        with pytest.raises(MpocError, match="the coded stream is damaged"):
            decode(stream[:length], 16, 24)
    with pytest.raises(MpocError, match="1 bytes are left over"):
        decode(torch.cat([stream, stream[:1]]), 16, 24)


@pytest.mark.parametrize("shape", [(16, 25), (15, 24), (1, 1), (1 << 20, 1 << 20)])
def test_rejects_another_shape(shape: tuple[int, int]) -> None:
    with pytest.raises(MpocError, match="the coded stream is damaged"):
        decode(coded(gaussian((16, 24), 1.0)), *shape)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 0.0, 1e37])
def test_rejects_scales_that_make_no_finite_numbers(scale: float) -> None:
    codes = gaussian((16, 24), 8.0)
    stream = encode(codes, torch.full((16,), 2), zeros(24), 1.0)
    stream[:4] = torch.frombuffer(bytearray(struct.pack("<f", scale)), dtype=torch.uint8)
    with pytest.raises(MpocError, match="scale"):
        decode(stream, 16, 24)


def test_corrupted_streams_give_the_shape_or_an_error() -> None:
    """Flipped, dropped and doubled bytes: a matrix of the shape, or one clear error."""
    shape = 24, 40
    streams = [coded(gaussian(shape, spread, 1.0)).tolist() for spread in (0.3, 2.0, 300.0)]
    generator = random.Random(0)
    refused = 0
    for _ in range(600):
        data = list(generator.choice(streams))
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(data))
            match generator.randrange(3):
                case 0:
                    data[at] = generator.randrange(256)
                case 1:
                    del data[at]
                case _:
                    data.insert(at, data[at])
        try:
            codes, *_ = decode(torch.tensor(data, dtype=torch.uint8), *shape)
            assert codes.shape == shape
        except MpocError:
            refused += 1
    assert refused > 400
