"""Pack codes of a few bits into words of 32 bits, low bits first.

Code k of a row occupies the bits k·b … k·b + b − 1 of the row's bit stream; a code may cross from one word
into the next, and each row is padded with zeros to whole words.  For 2, 4 and 8 bits no code crosses, and
the layout is that of every release of compressed-tensors; for 3, 5 and 6 bits it is that of its dense
layout (``pack_to_int32`` of compressed-tensors 0.15 and later).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpoc.quantize.storage import packed_words

# 32 codes of b bits fill b words exactly, whatever b.
_PERIOD = 32
_MASK = 0xFFFFFFFF


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes.

    Args:
        codes: (rows, columns) of uint8, each below 2^bits.
        bits: width of a code, 1 to 8.

    Returns:
        (rows, ⌈columns · bits / 32⌉) of int32.
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % _PERIOD)).view(rows, -1, _PERIOD)
    words = padded.new_zeros((rows, padded.shape[1], bits + 1), dtype=torch.int64)
    for k in range(_PERIOD):
        word, shift = divmod(k * bits, 32)
        shifted = padded[:, :, k].long() << shift
        words[:, :, word] |= shifted & _MASK
        words[:, :, word + 1] |= shifted >> 32
    signed = words[:, :, :bits].to(torch.int32)  # wraps to two's complement
    return signed.reshape(rows, -1)[:, : packed_words(columns, bits)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        words: (rows, ⌈columns · bits / 32⌉) of int32.
        bits: width of a code, 1 to 8.
        columns: number of codes in a row.

    Returns:
        (rows, columns) of uint8.
    """
    rows = len(words)
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)
    codes = words.new_empty((rows, padded.shape[1], _PERIOD), dtype=torch.uint8)
    for k in range(_PERIOD):
        word, shift = divmod(k * bits, 32)
        low = (padded[:, :, word] >> shift) & ((1 << min(bits, 32 - shift)) - 1)
        if shift + bits > 32:
            low = low | padded[:, :, word + 1] << (32 - shift)
        codes[:, :, k] = low & ((1 << bits) - 1)
    return codes.reshape(rows, -1)[:, :columns].contiguous()
