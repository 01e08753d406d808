from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpoc.data import CharacterTokenizer, TextOptions, hold_out, open_data
from mpoc.data import text as stream_module
from mpoc.data.text import TokenStream
from mpoc.errors import MpocError, UsageError


def test_reads_tiny_shakespeare(data: Path) -> None:
    file = data / "text" / "tinyshakespeare.txt"
    text = file.read_text("utf-8")
    found = hold_out(open_data(file), 0.1, 0)
    tokenizer = found.tokenizer
    assert isinstance(tokenizer, CharacterTokenizer)
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.vocab_size == 65
    train, validation = found.splits["train"], found.splits["validation"]
    assert isinstance(train, TokenStream)
    assert isinstance(validation, TokenStream)
    assert (len(train.tokens), len(validation.tokens)) == (1_003_854, 111_540)
    first = validation.batch([0, 1])["input_ids"].flatten().tolist()
    assert tokenizer.decode(first) == text[1_003_854 : 1_003_854 + 512]
    assert found.notes == ("no validation split: 0.1 of train held out, its end",)


@pytest.mark.parametrize("limit", [1 << 30, 0])
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_blocks_and_windows_match_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, piece: int
) -> None:
    monkeypatch.setattr(stream_module, "_PIECE", piece)
    text = "to be, or not\r\nto be: that is the quéstion\n" * 5
    (tmp_path / "train.txt").write_bytes(text.encode())
    (tmp_path / "test.txt").write_bytes(text[::-1].encode())
    data = open_data(tmp_path, text=TextOptions(block=8), limit=limit)
    assert list(data.splits) == ["train", "test"]
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, CharacterTokenizer)
    count = len(text) // 8
    blocks = data.splits["test"].batch(range(count))
    assert tokenizer.decode(blocks["input_ids"].flatten().tolist()) == text[::-1][: count * 8]
    assert blocks["attention_mask"].tolist() == [[1] * 8] * count
    train = data.splits["train"]
    assert len(train) == count
    windows = [tokenizer.decode(row) for row in train.batch(range(count))["input_ids"].tolist()]
    assert all(window in text for window in windows)


def test_windows_are_seeded_per_epoch() -> None:
    stream = TokenStream(torch.arange(1000, dtype=torch.int32), 10, seed=3)
    first = stream.batch(range(100))["input_ids"]
    stream.set_epoch(1)
    second = stream.batch(range(100))["input_ids"]
    stream.set_epoch(0)
    assert torch.equal(stream.batch(range(100))["input_ids"], first)
    assert not torch.equal(first, second)
    other = TokenStream(torch.arange(1000, dtype=torch.int32), 10, seed=4)
    assert not torch.equal(other.batch(range(100))["input_ids"], first)
    assert len(torch.unique(first[:, 0] % 10)) == 10  # at any place, not at block ends alone
    assert int(first.max()) <= 999


def test_every_position_can_be_drawn() -> None:
    stream = TokenStream(torch.arange(12, dtype=torch.int32), 10, seed=0)
    seen = set()
    for epoch in range(50):
        stream.set_epoch(epoch)
        seen.add(int(stream.batch([0])["input_ids"][0, 0]))
    assert seen == {0, 1, 2}


def test_blocks_are_in_order_without_a_seed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcde" * 24)
    data = open_data(tmp_path / "a.txt", text=TextOptions(block=8, seed=None))
    assert list(data.splits) == ["train"]
    found = data.splits["train"].batch(range(15))["input_ids"].flatten().tolist()
    assert found == [0, 1, 2, 3, 4] * 24


def test_rejects_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 40)
    with pytest.raises(MpocError, match=r"a\.txt: 0\.1 of 6 .* leaves a split empty") as caught:
        hold_out(open_data(tmp_path / "a.txt", text=TextOptions(block=20)), 0.1, 0)
    assert caught.value.hint == "choose a shorter --block, or provide more text"


@pytest.mark.parametrize("text", ["", "a", "abc" * 6])
def test_rejects_text_shorter_than_a_block(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(MpocError, match=r"a\.txt: train has fewer tokens than one block of 20"):
        open_data(tmp_path / "a.txt", text=TextOptions(block=20))


def test_rejects_empty_blocks() -> None:
    with pytest.raises(UsageError, match="block length must be a positive integer, got"):
        TextOptions(block=0)


def test_rejects_invalid_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe bad")
    with pytest.raises(MpocError, match=r"a\.txt: not text in UTF-8"):
        open_data(tmp_path / "a.txt")


def test_rejects_characters_absent_from_training(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abc" * 400)
    (tmp_path / "test.txt").write_text("abz" * 400)
    with pytest.raises(MpocError, match=r"test\.txt: character 'z' is not among the 3"):
        open_data(tmp_path)
