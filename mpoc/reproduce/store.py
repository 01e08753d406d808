"""Finished networks on disk, so that an interrupted or widened study trains only what is missing.

Each is a JSON file with everything that its result depends on; the weights of networks that others start from
lie beside it.  A file is there whole or not at all, and counts only where what it depends on is the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.writer import staged

_FORMAT = 1  # goes up where results of before would differ


@dataclass(frozen=True)
class Result:
    """A trained network."""

    parameters: int  # of the whole network
    start: float  # accuracy before training, per cent
    final: float
    best: float
    seconds: float  # factorisation, training and its evaluations
    steps: int
    device: str
    curve: list[dict[str, float]]  # epoch, accuracy and, where one chooses, validation
    milliseconds: float | None = None  # of a training step
    # By replaced layer, at the inner bonds; {} of a dense network.
    bonds: dict[str, list[int]] = field(default_factory=dict)
    entropies: dict[str, list[float]] = field(default_factory=dict)


class Store:
    """The folder of a study.

    Args:
        folder: made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, name: str, identity: dict[str, Any]) -> Result | None:
        """The stored result, if there is one of just this.

        Raises:
            MpocError: a damaged file.
        """
        file = self._file(name, identity, ".json")
        if not file.exists():
            return None
        try:
            return Result(**json.loads(file.read_text("utf-8"))["result"])
        except (ValueError, KeyError, TypeError) as error:
            raise MpocError(
                f"{file}: damaged: {error}", "remove it; that network is then trained again"
            ) from error

    def put(
        self, name: str, identity: dict[str, Any], result: Result, weights: dict[str, Tensor] | None = None
    ) -> None:
        """Keep a result, after the weights that it stands for."""
        if weights is not None:
            with staged(self._file(name, identity, ".safetensors")) as target:
                save_file({key: tensor.contiguous() for key, tensor in weights.items()}, target)
        record = {"identity": identity, "result": asdict(result)}
        with staged(self._file(name, identity, ".json")) as target:
            target.write_text(json.dumps(record, indent=1, ensure_ascii=False), "utf-8")

    def weights(self, name: str, identity: dict[str, Any]) -> dict[str, Tensor] | None:
        """Of a network that others start from; None where they are not there."""
        file = self._file(name, identity, ".safetensors")
        return load_file(file) if file.exists() else None

    def _file(self, name: str, identity: dict[str, Any], suffix: str) -> Path:
        words = json.dumps([_FORMAT, identity], sort_keys=True)
        digest = hashlib.blake2b(words.encode(), digest_size=6).hexdigest()
        return self.folder / f"{name}-{digest}{suffix}"
