"""What successive truncations say that they discarded."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from torch import Tensor

from mpoc.tensor_networks.fit.truncation import TruncatedSVD, Truncation, truncate
from mpoc.tensor_networks.fit.tt_svd import Fit
from mpoc.tensor_networks.structure import Structure


def fit_and_discarded(
    factorise: Callable[[Tensor, Structure, Truncation], Fit], weight: Tensor, structure: Structure, bond: int
) -> tuple[Fit, float]:
    """The fit, and the sum over its truncations."""
    lost: list[float] = []

    def recording(*args: object) -> TruncatedSVD:
        cut = truncate(*args)  # type: ignore[arg-type]
        lost.append(cut.discarded)
        return cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpoc.tensor_networks.fit.tt_svd.truncate", recording)
        return factorise(weight, structure, Truncation(bond)), math.fsum(lost)
