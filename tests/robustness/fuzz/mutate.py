"""Changes to inputs that keep enough of their form to get past the first check."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

_LONGEST = 1 << 22  # characters of a JSON text
_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 64, 255, 256, 65_536, 10**6, 10**9, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1),
    *(2**63, 2**64, 10**18, -(2**63), 10**30, 10**400, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf")),
)
_TEXTS = (
    *("", "a", "weight", "fc1.weight", "fc1.cores.0", "module.", "__metadata__", "..", "../x", "/etc/passwd"),
    *("a\0b", "\x1b[31m", "\ud800", "é", "🦜", "x" * 5000, "[bold]", "float32", "BF16", "F32", "F64"),
    *(
        "linear",
        "conv2d",
        "convmap",
        "embedding",
        "experts",
        "mpo",
        "svd",
        "tree",
        "mera",
        "svd+mpo",
        "dense",
    ),
    *("zeros", "reflect", "circular", "replicate", "zoo", "factory", "resnet:depth=20", "os:system"),
)


def some_json(choose: random.Random, deep: int = 2) -> Any:
    """Any JSON value, small or not."""
    kind = choose.randrange(9 if deep else 6)
    if kind < 3:
        return choose.choice(_NUMBERS)
    if kind < 5:
        return choose.choice(_TEXTS)
    if kind == 5:
        return choose.choice((None, True, False))
    if kind == 6:
        return {choose.choice(_TEXTS): some_json(choose, deep - 1) for _ in range(choose.randrange(3))}
    if kind == 7:
        return [some_json(choose, deep - 1)] * choose.choice((1, 2, 3, 70, 300, 3000))
    return [choose.choice((1, 2, 4)) for _ in range(choose.randrange(5))]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key of it."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _items(box: Any) -> Iterator[tuple[Any, Any]]:
    return iter(box.items() if isinstance(box, dict) else enumerate(box))


def change_json(value: Any, choose: random.Random) -> Any:
    """One to four changes somewhere in a JSON value; the value itself is changed."""
    for _ in range(choose.choice((1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return some_json(choose)
        box, key = choose.choice(places)
        _change_at(box, key, places, choose)
    return value


def _change_at(box: Any, key: Any, places: list[tuple[Any, Any]], choose: random.Random) -> None:
    kind, old = choose.randrange(8), box[key]
    if kind == 0:
        box[key] = some_json(choose)
    elif kind == 1:
        del box[key]
    elif kind == 2:
        other, place = choose.choice(places)
        box[key] = deepcopy(dict(_items(other)).get(place))
    elif kind == 3 and isinstance(box, list):
        box[key:key] = [deepcopy(old)] * choose.choice((1, 2, 100))
    elif kind == 3:
        box[choose.choice(_TEXTS)] = deepcopy(old)
    elif isinstance(old, str) and kind < 6:
        text = _change_text(old, choose)
        box[key] = text
    elif isinstance(old, int | float) and not isinstance(old, bool):
        box[key] = choose.choice((old + 1, old - 1, old * 2, -old, old // 2, old * 10**9, 0.5, not old))
    elif isinstance(old, list) and old:
        choose.shuffle(old)
    else:
        box[key] = choose.choice(_NUMBERS)


def _change_text(text: str, choose: random.Random) -> str:
    if text.startswith("{"):  # JSON within JSON: a manifest in a header
        try:
            return json.dumps(change_json(json.loads(text), choose))
        except ValueError:
            pass
    at = choose.randrange(len(text) + 1)
    return choose.choice((choose.choice(_TEXTS), text[:at] + choose.choice(_TEXTS) + text[at:], text[:at]))


def change_bytes(data: bytes, choose: random.Random) -> bytes:
    """Bits flipped, runs cut, doubled or overwritten."""
    found = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 5))):
        at = choose.randrange(len(found) + 1)
        length = choose.choice((1, 1, 2, 4, 8, 40))
        kind = choose.randrange(5)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = found[at : at + length] * choose.choice((1, 2, 50))
        elif kind == 3:
            found[at : at + length] = choose.randbytes(length)
        else:
            found[at : at + length] = choose.choice((b"\0", b"\xff", b"[", b"9", b"-", b'"')) * length
    return bytes(found)


def json_bytes(data: bytes, choose: random.Random) -> bytes:
    """A JSON text with some of its values changed, now and then some of its bytes."""
    if choose.random() < 0.1:
        return change_bytes(data, choose)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, choose)
    return _text(change_json(value, choose), data)


def _text(value: Any, data: bytes) -> bytes:
    """JSON; ``data`` where it would be too long, as of lists that hold themselves many times over."""
    parts, size = [], 0
    for part in json.JSONEncoder().iterencode(value):
        parts.append(part)
        size += len(part)
        if size > _LONGEST:
            return data
    return "".join(parts).encode("utf-8", "surrogatepass")


def safetensors_bytes(data: bytes, choose: random.Random) -> bytes:
    """A safetensors file with another header, another length of it, or other bytes."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    text, rest = data[8 : 8 + length], data[8 + length :]
    if not text or choose.random() < 0.1:
        return change_bytes(data, choose)
    text = json_bytes(text, choose)
    said = len(text)
    if choose.random() < 0.05:
        said = choose.choice((0, 1, said - 1, said + 1, said * 2, 10**8, 2**63, 2**64 - 1))
    if choose.random() < 0.1:
        rest = choose.choice((rest[:-4], rest + bytes(8), rest[: len(rest) // 2], rest * 2))
    return struct.pack("<Q", max(said, 0)) + text + rest


_OPCODES = (
    b"(.012FGIJKLMNPQRSTUVX]^abcdeghijlopqrstu})\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x94"
)
_PICKLED = (
    *(b"J" + struct.pack("<i", n) for n in (-1, 0, 1, 2**31 - 1)),
    *(b"\x8a\x08" + struct.pack("<q", n) for n in (-1, 2**40, 2**62, 2**63 - 1)),
    *(
        b"cbuiltins\nbytearray\n",
        b"cbuiltins\ncomplex\n",
        b"ctorch\nSize\n",
        b"cos\nsystem\n",
        b"\x86",
        b"\x85R",
    ),
    *(
        b"cnumpy\ndtype\n",
        b"cnumpy\nndarray\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"ccollections\nCounter\n",
    ),
    *(b"\x88", b"N", b"]", b"}", b")", b"q\x00h\x00h\x00\x86", b"X\x06\x00\x00\x00weight", b"U\x03BIN"),
)


def _pickle_bytes(data: bytes, choose: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(choose.choice((1, 2, 4))):
        at = choose.randrange(len(found) + 1)
        kind = choose.randrange(4)
        if kind == 0:
            found[at : at + choose.choice((0, 1, 2, 5))] = choose.choice(_PICKLED)
        elif kind == 1 and at < len(found):
            found[at] = choose.choice(_OPCODES)
        elif kind == 2:
            other = choose.randrange(len(found) + 1)
            found[at:at] = found[other : other + choose.choice((1, 8, 40))]
        else:
            found = bytearray(change_bytes(bytes(found), choose))
    return bytes(found)


def _entry(name: str, packed: int) -> zipfile.ZipInfo:
    """An entry without the time of day, so that a mutation repeats."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = packed
    return entry


def torch_bytes(data: bytes, choose: random.Random) -> bytes:
    """A ``torch.save`` file with another pickle in it, other entries, or other bytes."""
    if choose.random() < 0.2:
        return change_bytes(data, choose)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # a damaged archive, or none: the format of before torch 1.6
        return _pickle_bytes(data, choose)
    out = io.BytesIO()
    packed = choose.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(out, "w", packed) as archive:
        for name, content in entries:
            is_pickle = name.endswith(".pkl")
            changed = content
            if is_pickle or choose.random() < 0.1:
                changed = _pickle_bytes(content, choose) if is_pickle else change_bytes(content, choose)
            if choose.random() < 0.03:
                name = choose.choice((name + "x", "../" + name, name.replace("data", "constants"), "x"))
            if name not in archive.NameToInfo and choose.random() > 0.03:
                archive.writestr(_entry(name, packed), changed)
    return out.getvalue()


_TOML = (
    *(
        "bond",
        "ratio",
        "max-error",
        "size",
        "max-drop",
        "form",
        "sites",
        "shape",
        "conv",
        "input-shape",
        "layers",
    ),
    *(
        "exclude",
        "embeddings",
        "min-params",
        "allow-growth",
        "dtype",
        "seed",
        "device",
        "max-shard-size",
        "dense",
    ),
    *(
        " = ",
        "\n",
        '"',
        "'",
        "[layer.fc1]\n",
        '[layer."*"]\n',
        '[layer."re:c"]\n',
        "[",
        "]",
        "{",
        "}",
        ",",
        "#",
        ".",
    ),
    *(
        "0",
        "1",
        "-1",
        "4",
        "8",
        "0.5",
        "1e308",
        "nan",
        "inf",
        "-0.0",
        "1e-320",
        "9" * 30,
        "9" * 5000,
        "1979-05-27",
    ),
    *(
        "true",
        "false",
        '"mpo"',
        '"svd"',
        '"map"',
        '"4x4x3:4x4x4"',
        '"fc1=48x1:64x1"',
        '"20MB"',
        '"8x8"',
        '"float16"',
    ),
    *(
        '"conv=6x6:stride=2,groups=1"',
        '"re:("',
        '"re:a{99999999999}"',
        '"x=1"',
        "[[" * 400,
        '"auto"',
        '"cuda"',
    ),
)


def toml_bytes(data: bytes, choose: random.Random) -> bytes:
    """A TOML text with words of recipes put in, lines doubled or lost, or bytes changed."""
    if choose.random() < 0.1:
        return change_bytes(data, choose)
    lines = data.decode("utf-8", "replace").split("\n")
    for _ in range(choose.choice((1, 1, 2, 4))):
        at = choose.randrange(len(lines))
        kind = choose.randrange(5)
        if kind == 0:
            lines[at] = f"{choose.choice(_TOML)} = {choose.choice(_TOML)}"
        elif kind == 1 and " = " in lines[at]:
            lines[at] = lines[at].partition(" = ")[0] + " = " + choose.choice(_TOML)
        elif kind == 2 and len(lines) > 1:
            del lines[at]
        elif kind == 3:
            lines.insert(choose.randrange(len(lines) + 1), lines[at])
        else:
            place = choose.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + choose.choice(_TOML) + lines[at][place:]
    return "\n".join(lines).encode("utf-8", "replace")


def coded_bytes(data: bytes, choose: random.Random) -> bytes:
    """A shape and a coded stream, with another shape, other bytes, or other deflated codes."""
    rows, columns = struct.unpack("<2I", data[:8].ljust(8, b"\0"))
    stream = data[8:]
    kind = choose.randrange(8)
    if kind == 0:
        sides = (0, 1, rows, columns, 2 * rows, 1 << 16, (1 << 16) + 1, 1 << 31, (1 << 32) - 1)
        rows, columns = choose.choice(((choose.choice(sides), columns), (rows, choose.choice(sides))))
    elif kind < 4:
        stream = change_bytes(stream, choose)
    else:
        stream = _inflated_and_changed(stream, choose)
    return struct.pack("<2I", rows & 0xFFFFFFFF, columns & 0xFFFFFFFF) + stream


def _inflated_and_changed(stream: bytes, choose: random.Random) -> bytes:
    """A stream one of whose deflated parts holds other bytes, its length said before it mended or not."""
    found = [part for at in range(1, len(stream)) if (part := _deflated(stream, at)) is not None]
    if not found:
        return change_bytes(stream, choose)
    at, size, inflated = choose.choice(found)
    deflated = zlib.compressobj(9, zlib.DEFLATED, -15)
    changed = deflated.compress(change_bytes(inflated, choose)) + deflated.flush()
    said = choose.choice((len(changed),) * 9 + (len(changed) + 1,))
    return stream[: at - 1] + bytes([said & 127]) + changed + stream[at + size :]


def _deflated(stream: bytes, at: int) -> tuple[int, int, bytes] | None:
    """Where a deflated part of at most 127 bytes begins, its length and content, if one does at ``at``."""
    size = stream[at - 1]
    try:
        inflated = zlib.decompress(stream[at : at + size], -15)
    except zlib.error:
        return None
    return (at, size, inflated) if 0 < size < 128 and inflated else None
