"""Tokenizers, and text files as one stream of tokens.

A tokenizer maps text to token ids: one id per character, or as a Hugging Face directory defines.  A ``.txt``
is one stream of tokens, cut into blocks of equal length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.data.base import Batch, Data, DataSource, Examples
from mpoc.errors import MpocError, UsageError

_PIECE = 1 << 20  # characters that are tokenized together; pieces end with a line


class Tokenizer(Protocol):
    """Maps text to token ids below ``vocab_size``."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""

    @property
    def pad_id(self) -> int:
        """The id that fills a batch after shorter documents, where the attention mask is 0."""

    @property
    def mask_id(self) -> int | None:
        """The id of the mask token of masked language modelling; None where the tokenizer has none."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text, such as [CLS]; masked language modelling never masks them."""

    def encode(self, text: str) -> list[int]:
        """Token ids of running text, without special tokens."""

    def encode_documents(self, texts: Sequence[str], block: int) -> list[list[int]]:
        """Token ids of whole documents, special tokens added, each cut to at most ``block`` tokens."""

    def state(self) -> dict[str, Any]:
        """Plain JSON data from which :func:`tokenizer_from_state` rebuilds the tokenizer."""


class CharacterTokenizer:
    """One token per character, numbered in the order of the code points."""

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self._numbers = {character: number for number, character in enumerate(self.characters)}

    @classmethod
    def of(cls, texts: Iterable[str]) -> CharacterTokenizer:
        """The tokenizer of the characters that occur in these texts."""
        characters: set[str] = set()
        for text in texts:
            characters |= set(text)
        return cls("".join(characters))

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self.characters)

    @property
    def pad_id(self) -> int:
        """The id 0: there is no padding token, and the attention mask hides what fills a batch."""
        return 0

    @property
    def mask_id(self) -> None:
        """None: there is no mask token."""
        return None

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Empty: every character is text."""
        return ()

    def encode(self, text: str) -> list[int]:
        """Token ids of the characters.

        Raises:
            MpocError: a character that is not among those the tokenizer was made from.
        """
        try:
            return [self._numbers[character] for character in text]
        except KeyError as error:
            raise MpocError(
                f"character {error.args[0]!r} is not among the {self.vocab_size} of the tokenizer",
                "evaluate on text of the same characters, or use a tokenizer that covers all text",
            ) from error

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these token ids."""
        return "".join(self.characters[token] for token in tokens)

    def encode_documents(self, texts: Sequence[str], block: int) -> list[list[int]]:
        """Token ids of the first ``block`` characters of each document."""
        return [self.encode(text[:block]) for text in texts]

    def state(self) -> dict[str, Any]:
        """The characters, as plain data."""
        return {"characters": self.characters}


class HubTokenizer:
    """The tokenizer of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        """Read the tokenizer.

        Raises:
            MpocError: transformers is missing, or the directory holds no tokenizer.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MpocError("Hugging Face tokenizers need transformers", "pip install 'mpoc[hf]'") from error
        if (
            not (directory / "tokenizer_config.json").is_file()
            and not (directory / "tokenizer.json").is_file()
        ):
            raise MpocError(f"{directory}: no tokenizer (neither tokenizer.json nor tokenizer_config.json)")
        self.directory = directory
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MpocError(f"{directory}: its tokenizer cannot be read ({error})") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included."""
        return len(self._tokenizer)

    @property
    def pad_id(self) -> int:
        """The padding token, else the end-of-text token (GPT-2 has no other), else 0."""
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def mask_id(self) -> int | None:
        """The mask token, where the tokenizer has one."""
        token = self._tokenizer.mask_token_id
        return None if token is None else int(token)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The special tokens, such as [CLS] and [SEP]."""
        return tuple(self._tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of running text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode_documents(self, texts: Sequence[str], block: int) -> list[list[int]]:
        """Token ids of whole documents, special tokens included."""
        encoded = self._tokenizer(list(texts), truncation=True, max_length=block, return_attention_mask=False)
        return [list(tokens) for tokens in encoded["input_ids"]]

    def state(self) -> dict[str, Any]:
        """The path of the directory."""
        return {"directory": str(self.directory)}


def tokenizer_from_state(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer with this :meth:`Tokenizer.state`.

    Raises:
        MpocError: a state of neither kind, or its directory no longer exists.
    """
    if isinstance(state.get("characters"), str):
        return CharacterTokenizer(state["characters"])
    if isinstance(state.get("directory"), str):
        return HubTokenizer(Path(state["directory"]))
    raise MpocError(f"not the state of a tokenizer (keys: {', '.join(map(str, state)) or 'none'})")


@dataclass(frozen=True)
class TextOptions:
    """Options that turn text into examples."""

    tokenizer: Tokenizer | None = None  # None: the characters of the training text
    block: int = 256  # tokens per example; documents are cut to at most this many
    column: str | None = None  # the text column of a table; None: the only one, or one with a usual name
    seed: int | None = 0  # of the random blocks that training draws from a .txt; None: blocks in order

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError(f"the block length must be a positive integer, got {self.block}")


class TokenStream(Examples):
    """Blocks of a token stream: at random positions, redrawn each epoch, or one after another."""

    def __init__(self, tokens: Tensor, block: int, seed: int | None) -> None:
        """Cut ``tokens`` into blocks.

        Args:
            tokens: (length,) int32, in memory or mapped.
            block: tokens per example; in order, the remainder after the last whole block is not read.
            seed: seed of the random positions; None for blocks in order.
        """
        self.tokens = tokens
        self.block = block
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the positions of this epoch: one per whole block, so that an epoch is one pass."""
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
        end = int(len(self.tokens) * (1 - share))
        head, tail = self.tokens[:end], self.tokens[end:]
        return TokenStream(head, self.block, self.seed), TokenStream(tail, self.block, None)


def open_text(source: DataSource) -> Data:
    """Open UTF-8 text as token streams, one per split.

    Raises:
        MpocError: not UTF-8, shorter than a block, or a character that the training split lacks.
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
                "choose a shorter --block, or provide more text",
            )
    return Data(source.path, "txt", "text", splits, (), (), source.notes, tokenizer)


def _pieces(file: Path) -> Iterator[str]:
    """The text with its line ends, in pieces of about ``_PIECE`` characters that end with a line."""
    with file.open(encoding="utf-8", newline="") as text:
        try:
            while piece := text.read(_PIECE):
                yield piece + text.readline()
        except UnicodeDecodeError as error:
            raise MpocError(f"{file}: not text in UTF-8 ({error.reason})") from error


def _tokens(files: list[Path], tokenizer: Tokenizer, limit: int) -> Tensor:
    """(length,) int32: in memory where the text is small, else mapped from a temporary file."""
    if 4 * sum(file.stat().st_size for file in files) <= limit:
        pieces = [np.empty(0, np.int32), *_encoded(files, tokenizer)]
        return torch.from_numpy(np.concatenate(pieces))
    with tempfile.TemporaryFile() as spilled:  # has no name, and is deleted with the mapping
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
