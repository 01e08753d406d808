"""A ``.txt`` for language models: one stream of tokens, cut into blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.data.base import Batch, Data, Examples, Source
from mpoc.data.text import CharacterTokenizer, TextOptions, Tokenizer
from mpoc.errors import MpocError

_PIECE = 1 << 20  # characters that are tokenized together; pieces end with a line


class TokenStream(Examples):
    """Blocks of a token stream: at random places, drawn anew each epoch, or one behind the other."""

    def __init__(self, tokens: Tensor, block: int, seed: int | None) -> None:
        """A stream.

        Args:
            tokens: (length,) int32, in memory or mapped.
            block: tokens of an example; what is left behind the last whole block is not read in order.
            seed: of the random places; None for blocks in order.
        """
        self.tokens = tokens
        self.block = block
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the places of this epoch: as many as there are whole blocks, so that an epoch is one pass."""
        count = len(self.tokens) // self.block
        self._starts = torch.arange(count) * self.block
        if self.seed is not None and count:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            last = len(self.tokens) - self.block
            self._starts = torch.randint(0, last + 1, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``input_ids`` (n, block) int64 and an ``attention_mask`` of ones."""
        starts = self._starts[torch.as_tensor(indices, dtype=torch.int64)]
        ids = self.tokens[starts[:, None] + torch.arange(self.block)].to(torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def cut(self, share: float) -> tuple[TokenStream, TokenStream]:
        """The stream without its last ``share``, and that share with its blocks in order."""
        at = int(len(self.tokens) * (1 - share))
        head, tail = self.tokens[:at], self.tokens[at:]
        return TokenStream(head, self.block, self.seed), TokenStream(tail, self.block, None)


def open_text(source: Source) -> Data:
    """Text in UTF-8.

    Raises:
        MpocError: not UTF-8, shorter than a block, or a character that training has not.
    """
    options = source.text or TextOptions()
    train = source.files.get("train") or next(iter(source.files.values()))
    tokenizer = options.tokenizer or CharacterTokenizer.of(text for file in train for text in _pieces(file))
    splits: dict[str, Examples] = {}
    for split, files in source.files.items():
        seed = options.seed if split == "train" else None
        splits[split] = TokenStream(_tokens(files, tokenizer, source.limit), options.block, seed)
        if len(splits[split]) == 0:
            raise MpocError(
                f"{source.path}: {split} has fewer tokens than one block of {options.block}",
                "choose a shorter block, or bring more text",
            )
    return Data(source.path, "txt", "text", splits, (), (), source.notes, tokenizer)


def _pieces(file: Path) -> Iterator[str]:
    """The text, line ends as they are, in pieces of about ``_PIECE`` characters that end with a line."""
    with file.open(encoding="utf-8", newline="") as text:
        try:
            while piece := text.read(_PIECE):
                yield piece + text.readline()
        except UnicodeDecodeError as error:
            raise MpocError(f"{file}: not text in UTF-8 ({error.reason})") from error


def _tokens(files: list[Path], tokenizer: Tokenizer, limit: int) -> Tensor:
    """(length,) int32: in memory where the text is small, else in a temporary file, mapped."""
    if 4 * sum(file.stat().st_size for file in files) <= limit:
        held = [np.empty(0, np.int32), *_encoded(files, tokenizer)]
        return torch.from_numpy(np.concatenate(held))
    with tempfile.TemporaryFile() as spilled:  # no name is left: it goes when the mapping goes
        for tokens in _encoded(files, tokenizer):
            spilled.write(tokens.tobytes())
        spilled.flush()
        return torch.from_numpy(np.memmap(spilled, np.int32, "c"))


def _encoded(files: list[Path], tokenizer: Tokenizer) -> Iterator[NDArray[np.int32]]:
    for file in files:
        for piece in _pieces(file):
            try:
                yield np.asarray(tokenizer.encode(piece), np.int32)
            except MpocError as error:
                raise MpocError(f"{file}: {error}", error.hint) from error
