from __future__ import annotations

import math

import pytest
import torch

from mpoc.tensor_networks.fit.mera import haar, orthogonal_cores
from mpoc.tensor_networks.forms.mera import Mera
from mpoc.tensor_networks.structure import make_structure


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bond", [1, 2, 3, 5])
def test_cores_are_orthogonal(bond: int) -> None:
    structure = make_structure("linear", (36, 64), sites=5, form="mera")
    for core in orthogonal_cores(structure, bond, generator(0)):
        matrix = core.reshape(math.prod(core.shape[:2]), -1)
        upper, lower = matrix.shape
        gram = matrix.T @ matrix * (lower / upper) if upper >= lower else matrix @ matrix.T
        torch.testing.assert_close(gram, torch.eye(min(upper, lower), dtype=torch.float64))


def test_network_of_equal_bonds_is_orthogonal() -> None:
    structure = make_structure("linear", (256, 256), factors=((2,) * 8, (2,) * 8), form="mera")
    weight = Mera(orthogonal_cores(structure, 2, generator(1)), structure).to_weight()
    torch.testing.assert_close(weight @ weight.T, torch.eye(256, dtype=torch.float64))


def test_keeps_the_variance() -> None:
    structure = make_structure("linear", (512, 512), factors=((2,) * 9, (2,) * 9), form="mera")
    weight = Mera(orthogonal_cores(structure, 3, generator(2)), structure).to_weight()
    x = torch.randn(512, 500, generator=generator(3), dtype=torch.float64)
    assert float((weight @ x).var()) == pytest.approx(1.0, rel=0.2)


def test_haar_measure_is_isotropic() -> None:
    """The entries of a column have mean 0 and variance 1 / n; without the signs of R the first has not."""
    drawn = torch.stack([haar(4, 4, generator(seed))[:, 0] for seed in range(2000)])
    assert float(drawn.mean(0).abs().max()) < 0.05
    torch.testing.assert_close(drawn.var(0), torch.full((4,), 0.25, dtype=torch.float64), rtol=0.1, atol=0)


def test_is_seeded() -> None:
    structure = make_structure("linear", (16, 16), sites=4, form="mera")
    once, again, other = (orthogonal_cores(structure, 2, generator(seed)) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0])
