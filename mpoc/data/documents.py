"""A document an example: token numbers, cut at the block length and padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mpoc.data.base import Batch, Data, Examples, Source
from mpoc.data.labels import Column, Where, number_labels
from mpoc.data.rows import Rows
from mpoc.data.text import CharacterTokenizer, TextOptions, Tokenizer
from mpoc.errors import MpocError

TOKENIZED_AT_ONCE = 50_000_000
"""Documents with at most this many characters in all are tokenized once, before training (about half a
minute with a fast tokenizer); those of a larger set whenever a batch asks for them."""


class Documents(Examples):
    """Documents tokenized already, one behind the other."""

    def __init__(self, tokens: Tensor, starts: Tensor, pad_id: int, y: Tensor | None) -> None:
        self.tokens = tokens  # (sum of lengths,) int32
        self.starts = starts  # (n + 1,) int64: where each begins, and the end
        self.pad_id = pad_id
        self.y = y

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """``input_ids`` and ``attention_mask`` (n, T) int64, T the longest of them, and ``y``."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.starts[chosen + 1] - self.starts[chosen]
        places = torch.arange(int(lengths.max()))
        mask = places < lengths[:, None]  # (n, T)
        where = (self.starts[chosen][:, None] + places).clamp(max=len(self.tokens) - 1)
        ids = self.tokens[where].to(torch.int64).masked_fill(~mask, self.pad_id)
        batch = {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
        return batch if self.y is None else batch | {"y": self.y[chosen]}

    def lengths(self) -> Tensor:
        """Tokens of each."""
        return self.starts.diff()


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
        """As of :class:`Documents`."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        encoded = self.tokenizer.encode_documents(self.rows.take(self.kept[chosen].tolist()), self.block)
        y = None if self.y is None else self.y[chosen]
        return _held(encoded, self.tokenizer.pad_id, y).batch(range(len(encoded)))

    def chunks(self) -> Tensor | None:
        """Those of the file."""
        chunks = self.rows.chunks()
        return None if chunks is None else chunks[self.kept]


def _held(encoded: list[list[int]], pad_id: int, y: Tensor | None) -> Documents:
    starts = torch.tensor([0, *map(len, encoded)], dtype=torch.int64).cumsum(0)
    tokens = np.fromiter((token for tokens in encoded for token in tokens), np.int32, int(starts[-1]))
    return Documents(torch.from_numpy(tokens), starts, pad_id, y)


def assemble_documents(
    source: Source,
    form: str,
    rows: dict[str, Rows[str]],
    columns: dict[str, tuple[Column, Where]],
    names: tuple[str, ...],
) -> Data:
    """A checked data set of documents; ``columns`` are the labels of each split.

    Documents of white space alone are left out, and that is said.

    Raises:
        MpocError: no documents, a character that training has not, or a bad label.
    """
    options = source.text or TextOptions()
    labels, classes, notes = number_labels(columns, names)
    train = rows.get("train") or next(iter(rows.values()))
    tokenizer = options.tokenizer or CharacterTokenizer.of(text for texts in train.scan() for text in texts)
    splits: dict[str, Examples] = {}
    for split, held in rows.items():
        lengths = torch.tensor([len(text.strip()) for texts in held.scan() for text in texts])
        kept = torch.nonzero(lengths > 0).flatten()
        if len(kept) == 0:
            raise MpocError(f"{source.files[split][0]}: no documents with text in them")
        if len(kept) < len(held):
            notes.append(f"{split}: {len(held) - len(kept):,} empty documents left out")
        y = labels[split][kept] if split in labels else None
        if int(lengths.sum()) <= min(TOKENIZED_AT_ONCE, source.limit):
            splits[split] = _held(list(_encoded(held, tokenizer, options.block)), tokenizer.pad_id, y)
        else:
            splits[split] = LazyDocuments(held, kept, tokenizer, options.block, y)
    return Data(source.path, form, "text", splits, classes, (), (*source.notes, *notes), tokenizer)


def _encoded(rows: Rows[str], tokenizer: Tokenizer, block: int) -> Iterator[list[int]]:
    """The tokens of every document with text in it."""
    start = 0
    for texts in rows.scan():
        full = [(start + k, text) for k, text in enumerate(texts) if text.strip()]
        try:
            yield from tokenizer.encode_documents([text for _, text in full], block) if full else []
        except MpocError as error:
            raise MpocError(f"{rows.name(full[0][0])} or soon after: {error}", error.hint) from error
        start += len(texts)
