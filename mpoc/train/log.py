"""The training log: one JSON object a line. A resumed training goes on where its checkpoint was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Appends lines to a file.

    Args:
        path: of the file; None writes nothing.
        position: bytes to keep of what is there, as a checkpoint noted them; 0 starts anew.
    """

    def __init__(self, path: Path | None, position: int = 0) -> None:
        self._file = None
        if path is not None:
            self._path = path
            self._file = path.open("r+b" if position and path.exists() else "wb", buffering=0)
            self._file.truncate(min(position, os.fstat(self._file.fileno()).st_size))
            self._file.seek(0, os.SEEK_END)

    def write(self, **values: Any) -> None:
        """One line, with the file at once.

        Raises:
            OSError: of writing, with the file's name.
        """
        if self._file is None:
            return
        line = (json.dumps(values, ensure_ascii=False) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]  # less than all where a disk is nearly full
        except OSError as error:
            error.filename = str(self._path)
            raise

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._file.tell() if self._file is not None else 0

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All lines of a log."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
