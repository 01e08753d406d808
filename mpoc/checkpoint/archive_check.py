"""What ``torch.save`` never writes and a torch file from a stranger may hold: looked for before it is read.

An archive that is packed can become a thousand times as large in memory.  A pickle of a kilobyte can hold a
tuple of tuples that takes years to be hashed, or one so deep that hashing it ends the process.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

# A state dict's own tuples are a tensor's shape, strides and storage.
_LARGEST_TUPLE = 100_000
_DEEPEST_TUPLE = 100
_KEEPS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")

_Size = tuple[int, int]  # of a value: how many tuples and members it has when written out, how deep they go


def check_archive(path: Path) -> None:
    """Check a zip archive and the pickles in it.

    Raises:
        ValueError: it would expand when read.
        zipfile.BadZipFile: it is cut off.
    """
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("it is packed, as torch.save packs none")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("it claims to hold more bytes than it has")
        if len(set(names)) < len(names) or archive.comment:
            raise ValueError("it can be read in two ways")
        for info in infos:
            if info.filename.endswith(".pkl"):
                with archive.open(info) as file:
                    check_pickle(file)


def check_pickle(file: IO[bytes]) -> None:
    """Follow the next pickle of a file without making what it describes.

    Raises:
        ValueError: it holds a tuple too large or too deep to be hashed, or is broken.
    """
    stack: list[_Size | None] = []  # None: a mark
    memo: dict[Any, _Size | None] = {}
    for opcode, argument, _ in pickletools.genops(file):
        try:
            _follow(opcode, argument, stack, memo)
        except LookupError as error:
            raise ValueError("its pickle breaks off") from error


def _follow(
    opcode: pickletools.OpcodeInfo, argument: Any, stack: list[_Size | None], memo: dict[Any, _Size | None]
) -> None:
    if opcode.name in _KEEPS:
        memo[argument] = stack[-1]
    elif opcode.name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif opcode.name in _GETS:
        stack.append(memo[argument])
    elif opcode.name == "DUP":
        stack.append(stack[-1])
    else:
        taken = _take(opcode, stack)
        size = (1, 0)
        if opcode.name.startswith("TUPLE"):
            size = (1 + sum(count for count, _ in taken), 1 + max((depth for _, depth in taken), default=0))
            if size[0] > _LARGEST_TUPLE or size[1] > _DEEPEST_TUPLE:
                raise ValueError("it holds a tuple that expands without end")
        mark = opcode.name == "MARK"
        stack += [None if mark else size] * len(opcode.stack_after)


def _take(opcode: pickletools.OpcodeInfo, stack: list[_Size | None]) -> list[_Size]:
    """What the operation takes from the stack; marks are dropped."""
    before = opcode.stack_before
    count = len(before)
    if pickletools.markobject in before:
        count = before.index(pickletools.markobject)
        members: list[_Size | None] = []
        while (member := stack.pop()) is not None:
            members.append(member)
    else:
        members = []
    if count > len(stack):
        raise IndexError("an empty stack")
    if count:
        members = [*stack[-count:], *members]
        del stack[-count:]
    return [member for member in members if member is not None]
