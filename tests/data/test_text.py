from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpoc.data import CharacterTokenizer, HubTokenizer, TextOptions, open_data, tokenizer_from_state
from mpoc.errors import MpocError
from tests.data.samples import write_jsonl, write_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT tokenizer of nine words."""
    return write_tokenizer(tmp_path / "bert", WORDS)


def test_character_tokenizer_round_trips_json() -> None:
    tokenizer = CharacterTokenizer.of(["héllo", "wörld\n"])
    text = "hello".replace("e", "é")
    assert tokenizer.characters == "".join(sorted(set("héllowörld\n")))
    assert tokenizer.encode(text) == [tokenizer.characters.index(character) for character in text]
    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.encode("wörld\n") == tokenizer.encode("wörld\n")
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.special_ids) == (0, None, ())
    assert tokenizer.encode_documents(["low", "h"], 2) == [tokenizer.encode("lo"), tokenizer.encode("h")]


def test_names_an_unknown_character() -> None:
    with pytest.raises(MpocError, match="character 'z' is not among the 3"):
        CharacterTokenizer("abc").encode("abz")


def test_loads_the_tokenizer_of_a_directory(bert: Path) -> None:
    tokenizer = HubTokenizer(bert)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.mask_id) == (9, 0, 4)
    assert set(tokenizer.special_ids) == {0, 1, 2, 3, 4}
    assert tokenizer.encode("the cats") == [5, 6, 8]
    assert tokenizer.encode_documents(["the cats sat", "cat"], 4) == [[2, 5, 6, 3], [2, 6, 3]]
    assert tokenizer_from_state(json.loads(json.dumps(tokenizer.state()))).encode("cat") == [6]


def test_tokenises_documents(bert: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "the cats sat"}, {"text": "cat"}])
    data = open_data(file, text=TextOptions(HubTokenizer(bert), block=8))
    batch = data.splits["train"].batch([1, 0])
    assert batch["input_ids"].tolist() == [[2, 6, 3, 0, 0, 0], [2, 5, 6, 8, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert data.announce().endswith("jsonl; train 2; vocabulary 9")


def test_rejects_directories_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MpocError, match=r"no tokenizer \(neither"):
        HubTokenizer(tmp_path)
    with pytest.raises(MpocError, match=r"not the state of a tokenizer \(keys: other\)"):
        tokenizer_from_state({"other": 1})
