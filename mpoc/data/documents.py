"""Documents as examples: token ids cut at the block length, batches padded to their longest document.

Documents come as text, which is tokenized here, or as token ids that their files hold already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpoc.data.arrays import Column, Where, number_labels
from mpoc.data.base import Batch, Data, DataSource, Examples
from mpoc.data.columns import Rows
from mpoc.data.text import CharacterTokenizer, TextOptions, Tokenizer
from mpoc.errors import MpocError

# Documents with at most this many characters in all are tokenized once, before training (about half a minute
# with a fast tokenizer); those of a larger set whenever a batch asks for them.
TOKENIZED_AT_ONCE = 50_000_000


class Documents(Examples):
    """Tokenized documents, stored one after another.

    Args:
        tokens: (sum of lengths,) int32.
        starts: (n + 1,) int64: where each document begins, and the end of the last.
        pad_id: fills a batch after shorter documents.
        y: labels or targets of the documents.
        mask: (sum of lengths,) bool, False for stored padding; None where there is none.
    """

    def __init__(
        self, tokens: Tensor, starts: Tensor, pad_id: int, y: Tensor | None, mask: Tensor | None = None
    ) -> None:
        self.tokens = tokens
        self.starts = starts
        self.pad_id = pad_id
        self.y = y
        self.mask = mask

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``input_ids`` and ``attention_mask`` (n, T) int64, T the longest of them, and ``y``."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.starts[chosen + 1] - self.starts[chosen]
        places = torch.arange(int(lengths.max()))
        inside = places < lengths[:, None]  # (n, T)
        stored = (self.starts[chosen][:, None] + places).clamp(max=len(self.tokens) - 1)
        ids = self.tokens[stored].to(torch.int64).masked_fill(~inside, self.pad_id)
        mask = inside if self.mask is None else inside & self.mask[stored]
        batch = {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
        return batch if self.y is None else batch | {"y": self.y[chosen]}

    def lengths(self) -> Tensor:
        """(n,) tokens of each document."""
        return self.starts.diff()


class StoredDocuments(Documents):
    """Documents whose token ids were read from a file."""

    def __init__(self, *arguments: Any, where: Where) -> None:
        super().__init__(*arguments)
        self.where = where  # file and row of a document, for messages

    def check_vocabulary(self, size: int) -> None:
        """Check that a network with ``size`` tokens has every id.

        Raises:
            MpocError: it does not, with the file and row of the first such id.
        """
        beyond = torch.nonzero(self.tokens >= size).flatten()
        if len(beyond):
            place = int(beyond[0])
            row = int(torch.searchsorted(self.starts, place, right=True)) - 1
            raise MpocError(
                f"{self.where(row)}: token id {int(self.tokens[place])}, but the network has {size:,} tokens "
                f"(ids 0 to {size - 1})",
                "tokenize the text with the tokenizer of the network",
            )


class LazyDocuments(Examples):
    """Documents that are read and tokenized when a batch asks for them."""

    def __init__(
        self, rows: Rows[str], kept: Tensor, tokenizer: Tokenizer, block: int, y: Tensor | None
    ) -> None:
        self.rows = rows
        self.kept = kept  # (n,) int64: the rows that are not empty
        self.tokenizer = tokenizer
        self.block = block
        self.y = y

    def __len__(self) -> int:
        return len(self.kept)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The same batch as :class:`Documents` gives, tokenized now."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        encoded = self.tokenizer.encode_documents(self.rows.take(self.kept[chosen].tolist()), self.block)
        y = None if self.y is None else self.y[chosen]
        return _documents(encoded, self.tokenizer.pad_id, y).batch(range(len(encoded)))

    def chunks(self) -> Tensor | None:
        """(n,) the chunk of the file that holds each document, or None."""
        chunks = self.rows.chunks()
        return None if chunks is None else chunks[self.kept]


def _documents(encoded: list[list[int]], pad_id: int, y: Tensor | None) -> Documents:
    starts = torch.tensor([0, *map(len, encoded)], dtype=torch.int64).cumsum(0)
    tokens = np.fromiter((token for tokens in encoded for token in tokens), np.int32, int(starts[-1]))
    return Documents(torch.from_numpy(tokens), starts, pad_id, y)


def assemble_documents(
    source: DataSource,
    form: str,
    rows: dict[str, Rows[str]],
    columns: dict[str, tuple[Column, Where]],
    names: tuple[str, ...],
) -> Data:
    """A checked data set of documents; those of white space alone are left out, and ``notes`` counts them.

    Args:
        source: its options say how documents are tokenized.
        form: the format.
        rows: the documents of each split.
        columns: the labels of each split; {} where there are none.
        names: names of the classes, if the files have them.

    Raises:
        MpocError: no documents, a character that the training split lacks, or a bad label.
    """
    options = source.text or TextOptions()
    labels, classes, notes = number_labels(columns, names)
    train = rows.get("train") or next(iter(rows.values()))
    tokenizer = options.tokenizer or CharacterTokenizer.of(text for texts in train.scan() for text in texts)
    splits: dict[str, Examples] = {}
    for split, texts_of_split in rows.items():
        lengths = torch.tensor([len(text.strip()) for texts in texts_of_split.scan() for text in texts])
        kept = torch.nonzero(lengths > 0).flatten()
        if len(kept) == 0:
            raise MpocError(f"{source.files[split][0]}: no documents with text in them")
        if len(kept) < len(texts_of_split):
            notes.append(f"{split}: {len(texts_of_split) - len(kept):,} empty documents skipped")
        y = labels[split][kept] if split in labels else None
        if int(lengths.sum()) <= min(TOKENIZED_AT_ONCE, source.limit):
            encoded = list(_encoded_documents(texts_of_split, tokenizer, options.block))
            splits[split] = _documents(encoded, tokenizer.pad_id, y)
        else:
            splits[split] = LazyDocuments(texts_of_split, kept, tokenizer, options.block, y)
    return Data(source.path, form, "text", splits, classes, (), (*source.notes, *notes), tokenizer)


def _encoded_documents(rows: Rows[str], tokenizer: Tokenizer, block: int) -> Iterator[list[int]]:
    """Token ids of every document that is not empty."""
    start = 0
    for texts in rows.scan():
        full = [(start + k, text) for k, text in enumerate(texts) if text.strip()]
        try:
            yield from tokenizer.encode_documents([text for _, text in full], block) if full else []
        except MpocError as error:
            raise MpocError(f"{rows.name(full[0][0])} or soon after: {error}", error.hint) from error
        start += len(texts)


@dataclass(frozen=True)
class StoredTokens:
    """The token ids of one split, as its files hold them."""

    ids: NDArray[np.int64]  # (sum of lengths,), document after document
    lengths: NDArray[np.int64]  # (n,)
    mask: NDArray[np.int64] | None  # (sum of lengths,), 1 for a token and 0 for padding
    where: Where


def assemble_tokens(
    source: DataSource,
    form: str,
    tokens: dict[str, StoredTokens],
    columns: dict[str, tuple[Column, Where]],
    names: tuple[str, ...],
) -> Data:
    """A checked data set of documents that were tokenized before; arguments as of assemble_documents.

    Padding at the end of a document is dropped, and documents longer than the block are cut.

    Raises:
        MpocError: no documents, one without tokens, a negative id, a mask that is not 0 or 1, a bad label.
    """
    options = source.text or TextOptions()
    labels, classes, notes = number_labels(columns, names)
    pad_id = options.tokenizer.pad_id if options.tokenizer else 0
    splits: dict[str, Examples] = {}
    for split, stored in tokens.items():
        if len(stored.lengths) == 0:
            raise MpocError(f"{source.files[split][0]}: no examples")
        _check_ids(stored)
        ends, starts = _without_padding(stored)
        lengths = np.minimum(ends - starts, options.block)
        cut = int((ends - starts > options.block).sum())
        if cut:
            notes.append(f"{split}: {cut:,} of {len(lengths):,} examples are cut to {options.block} tokens")
        kept = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        mask = None if stored.mask is None else torch.from_numpy(stored.mask[kept] == 1)
        splits[split] = StoredDocuments(
            torch.from_numpy(stored.ids[kept].astype(np.int32)),
            torch.from_numpy(np.cumsum([0, *lengths])),
            pad_id,
            labels.get(split),
            mask,
            where=stored.where,
        )
    notes = [*source.notes, *notes]
    return Data(source.path, form, "text", splits, classes, (), tuple(notes), options.tokenizer)


def _check_ids(stored: StoredTokens) -> None:
    """Check the range of ids and mask; errors name the file and row."""

    def row(bad: NDArray[np.bool_]) -> str:
        place = int(np.flatnonzero(bad)[0])
        return stored.where(int(np.searchsorted(np.cumsum(stored.lengths), place, side="right")))

    if (stored.lengths == 0).any():
        raise MpocError(f"{stored.where(int(np.argmin(stored.lengths)))}: no tokens")
    out_of_range = (stored.ids < 0) | (stored.ids > np.iinfo(np.int32).max)
    if out_of_range.any():
        value = int(stored.ids[np.flatnonzero(out_of_range)[0]])
        raise MpocError(f"{row(out_of_range)}: token id {value}; ids from 0 to 2^31 − 1 were expected")
    if stored.mask is not None:
        odd = (stored.mask != 0) & (stored.mask != 1)
        if odd.any():
            value = int(stored.mask[np.flatnonzero(odd)[0]])
            raise MpocError(f"{row(odd)}: attention_mask {value}; 0 or 1 was expected")


def _without_padding(stored: StoredTokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bounds of each document in ``ids``, without the padding at its end.

    Raises:
        MpocError: a document is all padding.
    """
    ends = np.cumsum(stored.lengths)
    starts = ends - stored.lengths
    if stored.mask is None:
        return ends, starts
    places = np.where(stored.mask == 1, np.arange(1, len(stored.mask) + 1), 0)
    ends = np.maximum.reduceat(places, starts)
    if (ends == 0).any():
        raise MpocError(f"{stored.where(int(np.argmin(ends)))}: attention_mask is 0 for every token")
    return ends, starts
