from __future__ import annotations

from pathlib import Path

from mpoc.data.text import TokenStream
from mpoc.reproduce.experiment import open_paper_data


def text(folder: Path, words: str) -> Path:
    path = folder / "text.txt"
    path.write_text("".join(words[k % len(words)] for k in range(65 * 90)))
    return path


ALPHABET = "".join(map(chr, range(33, 33 + 65)))


def test_key_does_not_depend_on_drawn_windows(tmp_path: Path) -> None:
    """Else a dense network would be trained again for each network that starts from it."""
    path = text(tmp_path, ALPHABET)
    network = "picogpt:vocab=65,context=256"
    material, fresh = (open_paper_data(path, network, None, 0.0, 0) for _ in range(2))
    before = material.identity
    train = material.data.splits["train"]
    assert isinstance(train, TokenStream)
    train.set_epoch(3)
    assert material.identity == before == fresh.identity


def test_key_depends_on_the_text(tmp_path: Path) -> None:
    network = "picogpt:vocab=65,context=256"
    one = open_paper_data(text(tmp_path, ALPHABET), network, None, 0.0, 0).identity
    other = open_paper_data(text(tmp_path, ALPHABET[::-1]), network, None, 0.0, 0).identity
    assert one != other
