"""Tokenizers: characters, and those of Hugging Face directories; and how text is cut into examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mpoc.errors import MpocError, UsageError


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
