"""Batches in parts: each is summed by itself and the sums are merged in order, whoever makes them.

So several processes share a pass over the data, and find what one alone finds to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from mpoc.team import ALONE, Team

_MOST = 8  # parts: more processes than that cannot share a pass

_Key = TypeVar("_Key", bound=Hashable)
_Sum = TypeVar("_Sum")


@dataclass(frozen=True)
class Parts:
    """The parts of so many batches, and the processes that share them."""

    count: int
    mates: Team = ALONE

    @property
    def every(self) -> list[range]:
        """Batches of each part; their number does not depend on that of the processes."""
        parts = max(1, min(_MOST, self.count))
        return [range(*ends) for ends in pairwise(k * self.count // parts for k in range(parts + 1))]

    @property
    def mine(self) -> list[int]:
        """The batches that this process runs."""
        return [index for part in self.every[self.mates.rank :: self.mates.size] for index in part]

    def total(
        self, measure: Callable[[range], dict[_Key, _Sum]], merge: Callable[[_Sum, _Sum], _Sum]
    ) -> dict[_Key, _Sum]:
        """Sums over all batches, the same in all processes.

        Args:
            measure: of the batches of one part; tensors are on the CPU.
            merge: a sum over earlier batches and one over those after them.
        """
        total: dict[_Key, _Sum] = {}
        for first in range(0, len(self.every), self.mates.size):
            parts = self.every[first : first + self.mates.size]
            found: dict[_Key, _Sum] = {}
            with self.mates.together():
                if self.mates.rank < len(parts):
                    found = measure(parts[self.mates.rank])
            for owner in range(len(parts)):
                for key in self.mates.told(list(found), by=owner):
                    given = self.mates.told(found.pop(key) if owner == self.mates.rank else None, by=owner)
                    total[key] = merge(total[key], given) if key in total else given
        return total
