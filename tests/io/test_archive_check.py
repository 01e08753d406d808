"""Torch files that would expand: refused before they do."""

from __future__ import annotations

import io
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpoc.errors import MpocError
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.io.torch_file import check_pickle
from tests.io.test_torch_file import refusal, save
from tests.support.checkpoints import mlp_state
from tests.support.process import environment, run_python


def repacked(path: Path, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as archive:
        entries = [(name, change(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def with_pickle(path: Path, text: bytes) -> Path:
    """A torch file whose pickle is another."""
    save(mlp_state(), path, legacy=False)
    return repacked(path, lambda name, content: text if name.endswith("data.pkl") else content)


def nested(levels: int, tuples: bytes = b"\x86") -> bytes:
    """{((…, …), (…, …)): 1}: a kilobyte; 2^levels members."""
    doubled = b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + tuples for k in range(levels))
    return b"\x80\x02}" + b"K\x01" + doubled + b"K\x01s."


def test_nested_tuple_pickle_is_valid() -> None:
    assert pickle.loads(nested(2)) == {((1, 1), (1, 1)): 1}
    assert len(nested(60)) < 400


@pytest.mark.parametrize("legacy", [False, True])
def test_rejects_tuples_that_hash_slowly(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "m.pt"
    if legacy:
        path.write_bytes(nested(60))
    else:
        with_pickle(path, nested(60))
    assert "a tuple that expands without end" in str(refusal(path))


def test_rejects_deeply_nested_tuples(tmp_path: Path) -> None:
    with_pickle(tmp_path / "m.pt", b"\x80\x02}K\x01" + b"\x85" * 200_000 + b"K\x01s.")
    assert "a tuple that expands without end" in str(refusal(tmp_path / "m.pt"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_accepts_plain_data_of_every_protocol(protocol: int) -> None:
    value = {"a": [1, 2.5, "x", b"y", None, True, (), (1,), (1, 2, 3), (1, 2, 3, 4)], "b": {(1, 2): {3, 4}}}
    text = pickle.dumps([value, value], protocol)
    file = io.BytesIO(text + b"rest")
    check_pickle(file)
    assert file.read() == b"rest"
    for length in range(len(text) - 1):
        with pytest.raises(ValueError):
            check_pickle(io.BytesIO(text[:length]))


def test_follows_every_pickle_opcode() -> None:
    """An operation that takes from an empty stack is refused; none ends in another error."""
    for opcode in pickletools.opcodes:
        if opcode.arg is None:
            try:
                check_pickle(io.BytesIO(opcode.code.encode("latin1") + b"."))
            except ValueError:
                continue
            assert not opcode.stack_before, opcode.name


def test_rejects_compressed_archives(tmp_path: Path) -> None:
    """A thousand times its size in memory."""
    save({"a.weight": torch.zeros(3000, 1000)}, tmp_path / "m.pt", legacy=False)
    repacked(tmp_path / "m.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "m.pt").stat().st_size < 20_000
    assert "packed" in str(refusal(tmp_path / "m.pt"))


@pytest.mark.slow
def test_rejects_overlapping_entries(tmp_path: Path) -> None:
    path = save(mlp_state(), tmp_path / "m.pt", legacy=False)
    text = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start, first = archive.start_dir, archive.infolist()[-1]
    end = text.index(b"PK\x05\x06")
    one = text[text.rindex(b"PK\x01\x02") : text.index(b"PK\x06\x06") if b"PK\x06\x06" in text else end]
    assert first.filename.encode() in one
    many = one * 60_000
    count = (60_000).to_bytes(2, "little")
    tail = text[end : end + 8] + count + count + len(many).to_bytes(4, "little") + text[end + 16 :]
    path.write_bytes(text[:start] + many + tail)
    refusal(path)


def test_rejects_duplicate_names(tmp_path: Path) -> None:
    path = save(mlp_state(), tmp_path / "m.pt", legacy=False)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"another pickle")
    assert "read in two ways" in str(refusal(path))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shape", [(10**9, 10**9), (3, 10**6), (1000, 1000)])
def test_rejects_tensors_expanded_from_few_bytes(
    tmp_path: Path, shape: tuple[int, ...], legacy: bool
) -> None:
    state = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(1).expand(shape)}
    error = refusal(save(state, tmp_path / "m.pt", legacy))
    assert "tensor 'b.weight'" in str(error) and "repeats the same few bytes" in str(error)


def test_rejects_many_views_of_the_same_bytes(tmp_path: Path) -> None:
    whole = torch.zeros(5000)
    state = {f"{k}.weight": whole[k : k + 4900].reshape(49, 100) for k in range(100)}
    assert "repeats the same few bytes" in str(refusal(save(state, tmp_path / "m.pt", legacy=False)))


def test_accepts_usual_views(tmp_path: Path) -> None:
    flat = torch.randn(5000)
    state = {
        "rnn.weight": flat[:2500].view(50, 50),
        "rnn.other": flat[2500:].view(50, 50),
        "whole": flat,
        "mask": torch.ones(1).expand(4, 100),
    }
    checkpoint = open_checkpoint(save(state, tmp_path / "m.pt", legacy=False))
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())


BOMBS: dict[str, Callable[[], bytes]] = {
    "bytearray": lambda: (
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R."
    ),
    "array": lambda: b"\x80\x02cnumpy\nndarray\n(\x8a\x06" + (10**13).to_bytes(6, "little") + b"t\x85R.",
    "dtype": lambda: b"\x80\x02cnumpy\ndtype\n](X\x01\x00\x00\x00aX\x02\x00\x00\x00f8\x86ee\x85R.",
    "size": lambda: b"\x80\x02ctorch\nSize\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_rejects_pickles_that_allocate_too_much(tmp_path: Path, bomb: str) -> None:
    refusal(with_pickle(tmp_path / "m.pt", BOMBS[bomb]()))


@pytest.mark.slow
def test_rejects_recursive_and_deep_dicts(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"x": torch.zeros(2)}
    for _ in range(60):
        inner = {"x": torch.zeros(2), "a": inner, "b": inner}
    assert "no state dict" in str(refusal(save(inner, tmp_path / "m.pt", legacy=False)))
    with_pickle(tmp_path / "loop.pt", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.")
    assert "no state dict" in str(refusal(tmp_path / "loop.pt"))
    deep = b"}X\x01\x00\x00\x00a" * 100_000 + b"}" + b"s" * 100_000
    refusal(with_pickle(tmp_path / "deep.pt", b"\x80\x02" + deep + b"."))


@pytest.mark.slow
def test_never_allocates_a_declared_storage(tmp_path: Path) -> None:
    """A storage of 16 GB in a file of a kilobyte, in the format of before torch 1.6: memory stays small."""
    path = save({"a.weight": torch.zeros(300)}, tmp_path / "m.pt", legacy=True)
    small, huge = b"M" + (300).to_bytes(2, "little"), b"\x8a\x05" + (4 << 30).to_bytes(5, "little")
    text = path.read_bytes()
    assert text.count(small) >= 1
    path.write_bytes(text.replace(small, huge))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\nfrom mpoc.io.open_checkpoint import open_checkpoint\n"
        "from mpoc.errors import MpocError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    open_checkpoint(Path(sys.argv[1]))\nexcept MpocError as error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    said = run_python("-c", code, path)
    assert "m.pt: not a torch file, or a truncated or damaged one" in said
    assert int(said.splitlines()[-1]) < 200


@pytest.mark.slow
def test_rejects_bombs_with_little_address_space(tmp_path: Path) -> None:
    with_pickle(
        tmp_path / "m.pt", BOMBS["bytearray"]().replace((10**13).to_bytes(6, "little"), b"\0\0\0\0\3\0")
    )
    code = (
        "import sys, resource, torch\nfrom mpoc.cli.app import app\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try:\n    app(['compress', sys.argv[1], '--bond', '2'])\n"
        "except SystemExit as stop:\n    print('status', stop.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m.pt"], env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "status 1\n" and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and "m.pt: not a torch file" in done.stderr


def test_shortens_long_names_in_errors(tmp_path: Path) -> None:
    error = refusal(save({"module." * 1000: torch.zeros(2)}, tmp_path / "m.pt", legacy=False))
    assert "a name of 7000 characters" in str(error)
    assert isinstance(error, MpocError)
