"""Tokenizers: characters, and those of Hugging Face directories; and how text is cut into examples.

A ``.txt`` for language models: one stream of tokens, cut into blocks.
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
    """Text to token numbers below ``vocab_size``."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""

    @property
    def pad_id(self) -> int:
        """Fills a batch behind shorter documents, where the attention mask is 0."""

    @property
    def mask_id(self) -> int | None:
        """Stands for a hidden token in masked language modelling; None where the tokenizer has none."""

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that stand for no text, which masked language modelling leaves alone."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a piece of running text, no special ones added."""

    def encode_documents(self, texts: Sequence[str], block: int) -> list[list[int]]:
        """The tokens of whole documents, special ones added, each cut to at most ``block``."""

    def state(self) -> dict[str, Any]:
        """What :func:`tokenizer_from_state` makes it from again; plain JSON."""


class CharacterTokenizer:
    """One token a character, numbered in the order of their code points."""

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self._numbers = {character: number for number, character in enumerate(self.characters)}

    @classmethod
    def of(cls, texts: Iterable[str]) -> CharacterTokenizer:
        """The tokenizer of the characters that occur in these texts."""
        found: set[str] = set()
        for text in texts:
            found |= set(text)
        return cls("".join(found))

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self.characters)

    @property
    def pad_id(self) -> int:
        """The first character: there is none of its own, and the attention mask hides it."""
        return 0

    @property
    def mask_id(self) -> None:
        """None: characters know no mask."""
        return None

    @property
    def special_ids(self) -> tuple[int, ...]:
        """None of the characters."""
        return ()

    def encode(self, text: str) -> list[int]:
        """The characters' numbers.

        Raises:
            MpocError: a character that is not among those the tokenizer was made from.
        """
        try:
            return [self._numbers[character] for character in text]
        except KeyError as error:
            raise MpocError(
                f"character {error.args[0]!r} is not among the {self.vocab_size} this tokenizer knows",
                "evaluate on text of the same characters, or use a tokenizer that covers all text",
            ) from error

    def decode(self, tokens: Sequence[int]) -> str:
        """The text again."""
        return "".join(self.characters[token] for token in tokens)

    def encode_documents(self, texts: Sequence[str], block: int) -> list[list[int]]:
        """Each document's first ``block`` characters."""
        return [self.encode(text[:block]) for text in texts]

    def state(self) -> dict[str, Any]:
        """The characters."""
        return {"characters": self.characters}


class HubTokenizer:
    """The tokenizer of a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        """Read it.

        Raises:
            MpocError: transformers is missing, or there is no tokenizer in the directory.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MpocError("Hugging Face tokenizers need transformers", "pip install 'mpoc[hf]'") from error
        if (
            not (directory / "tokenizer_config.json").is_file()
            and not (directory / "tokenizer.json").is_file()
        ):
            raise MpocError(f"{directory}: no tokenizer in it (tokenizer.json, tokenizer_config.json)")
        self.directory = directory
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MpocError(f"{directory}: its tokenizer cannot be read ({error})") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._tokenizer)

    @property
    def pad_id(self) -> int:
        """The tokenizer's own, its end-of-text token where it has none (GPT-2), else 0."""
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def mask_id(self) -> int | None:
        """The tokenizer's own."""
        token = self._tokenizer.mask_token_id
        return None if token is None else int(token)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The tokenizer's own, e.g. [CLS] and [SEP]."""
        return tuple(self._tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """The tokens of running text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def encode_documents(self, texts: Sequence[str], block: int) -> list[list[int]]:
        """The tokens of whole documents."""
        found = self._tokenizer(list(texts), truncation=True, max_length=block, return_attention_mask=False)
        return [list(tokens) for tokens in found["input_ids"]]

    def state(self) -> dict[str, Any]:
        """The directory's name."""
        return {"directory": str(self.directory)}


def tokenizer_from_state(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that gave this state.

    Raises:
        MpocError: a state of neither kind, or the directory is gone.
    """
    if isinstance(state.get("characters"), str):
        return CharacterTokenizer(state["characters"])
    if isinstance(state.get("directory"), str):
        return HubTokenizer(Path(state["directory"]))
    raise MpocError(f"not the state of a tokenizer (keys: {', '.join(map(str, state)) or 'none'})")


@dataclass(frozen=True)
class TextOptions:
    """How text becomes examples."""

    tokenizer: Tokenizer | None = None  # None: the characters of the training text
    block: int = 256  # tokens of an example; for documents the most that are kept
    column: str | None = None  # of a table with several text columns
    seed: int | None = 0  # of the random windows that training draws from a .txt; None: blocks in order

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError(f"a block of {self.block} tokens: at least 1 is needed")


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


def open_text(source: DataSource) -> Data:
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
