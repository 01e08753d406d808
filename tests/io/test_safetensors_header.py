"""The header against the safetensors library, both ways, and against files that are none."""

import json
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.io.safetensors_header import DTYPES, ITEMSIZE, TensorInfo, encode_header, read_header, storage_order

SOME = settings(max_examples=60, deadline=None, derandomize=True)

_NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
_SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TENSORS = st.dictionaries(_NAMES, st.tuples(st.sampled_from(sorted(ITEMSIZE)), _SHAPES), max_size=6).map(
    lambda table: [TensorInfo(name, *rest) for name, rest in table.items()]
)
METADATA = st.dictionaries(_NAMES, st.text(st.characters(exclude_categories=["Cs"])), max_size=1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "m.safetensors"


def data(info: TensorInfo) -> Tensor:
    """Bytes 0, 1, 2, … as a tensor."""
    raw = torch.arange(info.nbytes, dtype=torch.int64) % 2  # 0 and 1: also good as booleans
    return raw.to(torch.uint8).view(getattr(torch, info.dtype)).reshape(info.shape)


def as_written_here(tensors: list[TensorInfo], metadata: dict[str, str]) -> bytes:
    ordered = storage_order(tensors)
    raw = [data(info).reshape(-1).view(torch.uint8).numpy().tobytes() for info in ordered]
    return encode_header(ordered, metadata) + b"".join(raw)


def with_length(text: bytes, length: int | None = None, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def entry(**changes: Any) -> bytes:
    """A file of one float32 tensor (2,), with some of its entry changed."""
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return with_length(json.dumps({"a": good | changes}).encode(), rest=bytes(8))


ENTRY = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def tensors_at(offsets: tuple[list[int], list[int]], size: int) -> bytes:
    """Two float32 tensors (2,) at these offsets, in a file of ``size`` bytes of data."""
    table = {
        k: {"dtype": "F32", "shape": [2], "data_offsets": at} for k, at in zip("ab", offsets, strict=True)
    }
    return with_length(json.dumps(table).encode(), rest=bytes(size))


@SOME
@given(TENSORS, METADATA)
def test_matches_the_library_byte_for_byte(
    file: Path, tensors: list[TensorInfo], metadata: dict[str, str]
) -> None:
    save_file({info.name: data(info) for info in tensors}, file, metadata or None)
    assert as_written_here(tensors, metadata) == file.read_bytes()


@SOME
@given(TENSORS, METADATA)
def test_library_reads_our_files(file: Path, tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
    file.write_bytes(as_written_here(tensors, metadata))
    with safe_open(file, framework="pt") as handle:
        assert (handle.metadata() or {}) == metadata
        assert set(handle.keys()) == {info.name for info in tensors}
        for info in tensors:
            tensor = handle.get_tensor(info.name)
            assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, info.dtype), info.shape)
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), data(info).reshape(-1).view(torch.uint8))


@SOME
@given(TENSORS, st.dictionaries(_NAMES, st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_reads_files_of_the_library(file: Path, tensors: list[TensorInfo], metadata: dict[str, str]) -> None:
    save_file({info.name: data(info) for info in tensors}, file, metadata or None)
    header = read_header(file)
    assert header.tensors == {info.name: info for info in tensors}
    assert header.metadata == metadata


def test_knows_every_dtype_and_its_size() -> None:
    for name, size in DTYPES.values():
        assert getattr(torch, name).itemsize == size


def test_counts_elements() -> None:
    info = TensorInfo("a", "bfloat16", (3, 4, 5))
    assert (info.numel, info.nbytes) == (60, 120)
    assert TensorInfo("scalar", "float64", ()).nbytes == 8


@SOME
@given(TENSORS)
def test_aligns_every_tensor(tensors: list[TensorInfo]) -> None:
    ordered = storage_order(tensors)
    start = len(encode_header(ordered, {}))
    assert start % 8 == 0
    for info in ordered:
        assert start % ITEMSIZE[info.dtype] == 0
        start += info.nbytes


def test_rejects_truncation_anywhere(file: Path) -> None:
    tensors = [TensorInfo("layer.weight", "float32", (3, 5)), TensorInfo("b", "int8", (2,))]
    whole = as_written_here(tensors, {"mpoc": "{}"})
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(MpocError, match=r"truncated|not a safetensors file"):
            read_header(file)
    file.write_bytes(whole[:-3])
    with pytest.raises(MpocError, match=r"m\.safetensors: truncated: 3 bytes missing .*tensor 'b'"):
        read_header(file)


HOSTILE = {
    "empty": b"",
    "no header": with_length(b""),
    "length of 16 EB": with_length(b"{}", 2**64 - 1),
    "length of 101 MB": with_length(b"{}", 101_000_000),
    "header longer than the file": with_length(b"{}", 3),
    "a zip file": b"PK\x03\x04" + bytes(100),
    "no JSON": with_length(b"{a}"),
    "no UTF-8": with_length(b'{"\xff": 1}'),
    "a list": with_length(b"[]"),
    "a number": with_length(b"12"),
    "deep": with_length(b"[" * 100_000),
    "long digits": with_length(b'{"a":' + b"9" * 5000 + b"}"),
    "metadata a list": with_length(b'{"__metadata__":[1]}'),
    "metadata null": with_length(b'{"__metadata__":null}'),
    "metadata a number": with_length(b'{"__metadata__":{"mpoc":3}}'),
    "entry null": with_length(b'{"a":null}'),
    "entry a list": with_length(b'{"a":[1]}'),
    "entry empty": with_length(b'{"a":{}}'),
    "dtype unknown": entry(dtype="F128"),
    "dtype a list": entry(dtype=["F32"]),
    "shape null": entry(shape=None),
    "shape text": entry(shape="2"),
    "shape of text": entry(shape=["2"]),
    "shape of floats": entry(shape=[2.0]),
    "shape of truth": entry(shape=[True, 2]),
    "shape infinite": entry(shape=[math.inf]),
    "shape negative": entry(shape=[-1, -2]),
    "shape huge": entry(shape=[10**40] * 50),
    "shape too large": entry(shape=[3]),
    "shape too small": entry(shape=[1]),
    "offsets negative": entry(data_offsets=[-8, 0]),
    "offsets backwards": entry(data_offsets=[8, 0]),
    "offsets of floats": entry(data_offsets=[0.0, 8.0]),
    "offsets huge float": entry(data_offsets=[0.5, 10**400]),
    "offsets three": entry(data_offsets=[0, 4, 8]),
    "offsets a number": entry(data_offsets=8),
    "offsets behind the end": entry(data_offsets=[8, 16]),
    "shape without end": entry(shape=[1] * 100_000),
    "digits without end": entry(shape=[10**4000] * 300),
    "sides of no number": entry(shape=[2**70, 0], data_offsets=[0, 0]),
    "bytes shared": tensors_at(([0, 8], [4, 12]), 12),
    "bytes of two": tensors_at(([0, 8], [0, 8]), 8),
    "a hole": tensors_at(([0, 8], [16, 24]), 24),
    "bytes of none": tensors_at(([0, 8], [8, 16]), 20),
    "a name twice": with_length(b'{"a":%b,"a":%b}' % (ENTRY, ENTRY), rest=bytes(8)),
    "a name without end": with_length(b'{"%b":%b}' % (b"module." * 10_000, ENTRY), rest=bytes(8)),
    "half a character": with_length(b'{"\\ud800":%b}' % ENTRY, rest=bytes(8)),
    "not a number": with_length(b'{"__metadata__":{},"a":NaN}'),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_rejects_hostile_headers(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(MpocError, match=r"m\.safetensors: "):
        read_header(file)


def test_accepts_adjacent_tensors(file: Path) -> None:
    for offsets in (([0, 8], [8, 16]), ([8, 16], [0, 8])):
        file.write_bytes(tensors_at(offsets, 16))
        assert set(read_header(file).tensors) == {"a", "b"}


def test_never_allocates_a_declared_length(file: Path) -> None:
    file.write_bytes(with_length(b"{}", 99_000_000))
    tracemalloc.start()
    with pytest.raises(MpocError, match="truncated in its header: 10 bytes, header of 99000000"):
        read_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_accepts_the_unchanged_entry(file: Path) -> None:
    file.write_bytes(entry())
    assert read_header(file).tensors == {"a": TensorInfo("a", "float32", (2,))}


def test_names_the_tensor_of_an_unknown_dtype(file: Path) -> None:
    file.write_bytes(entry(dtype="F128"))
    with pytest.raises(MpocError, match="tensor 'a' has dtype F128"):
        read_header(file)
    file.write_bytes(entry(dtype="F8_E8M0"))
    with pytest.raises(MpocError, match=r"already quantised: blocks of F8_E8M0 .*tensor 'a'"):
        read_header(file)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES]) | _JSON,
        "shape": st.lists(st.integers(-2, 4), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | _JSON,
    }
)


@SOME
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), _ENTRY | _JSON, max_size=3) | _JSON)
def test_any_json_is_read_or_rejected(file: Path, value: Any) -> None:
    file.write_bytes(with_length(json.dumps(value).encode(), rest=bytes(40)))
    try:
        header = read_header(file)
    except MpocError:
        return
    assert all(isinstance(text, str) for text in header.metadata.values())
    for info in header.tensors.values():
        assert info.dtype in ITEMSIZE and 0 <= info.nbytes <= 40
        assert all(type(side) is int and side >= 0 for side in info.shape)


@SOME
@given(st.binary(max_size=64))
def test_rejects_garbage(file: Path, content: bytes) -> None:
    file.write_bytes(with_length(content))
    try:
        tensors = read_header(file).tensors
    except MpocError:
        return
    assert tensors == {} and json.loads(content) in ({}, {"__metadata__": {}})
