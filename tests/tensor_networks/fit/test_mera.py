"""The fit of a MERA: its start against SVDs of the whole weight, planted weights, and that f never rises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mpoc.tensor_networks.fit.decompose import decompose
from mpoc.tensor_networks.fit.lbfgs import LBFGS
from mpoc.tensor_networks.fit.mera import fit_mera, tree_cores
from mpoc.tensor_networks.fit.truncation import Target, Truncation
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import interleave
from mpoc.tensor_networks.forms.mera import Mera
from mpoc.tensor_networks.structure import Structure, make_structure

KINDS = [
    ("linear", (24, 36), False, 4),
    ("linear", (30, 37), True, 4),  # padded
    ("conv2d", (8, 6, 3, 3), False, 3),
    ("embedding", (37, 12), False, 3),
    ("experts", (3, 8, 12), False, 3),
]


def structure(kind: str, shape: tuple[int, ...], transposed: bool, sites: int) -> Structure:
    return make_structure(kind, shape, transposed, sites, form="mera")


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(weight: Tensor, of: Structure, bond: int) -> Tensor:
    cores = tree_cores(interleave(weight, of), of, bond, torch.Generator().manual_seed(0))
    return form_of(cores, of).to_weight()


def error(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize(("kind", "shape", "transposed", "sites"), KINDS)
def test_start_is_exact_at_full_bond(kind: str, shape: tuple[int, ...], transposed: bool, sites: int) -> None:
    weight, of = drawn(shape), structure(kind, shape, transposed, sites)
    torch.testing.assert_close(start(weight, of, 150), weight)


def test_start_of_three_sites_is_an_svd() -> None:
    """Inputs fit through the bond, so one cut is left: site 1 and its partner's input against the rest."""
    of = make_structure("linear", (24, 24), factors=((2, 3, 4), (4, 3, 2)), form="mera")
    weight = drawn((24, 24))
    whole = weight.numpy().reshape(2, 3, 4, 4, 3, 2)  # j1 j2 j3 i1 i2 i3
    values = np.linalg.svd(whole.transpose(0, 3, 4, 1, 2, 5).reshape(24, 24), compute_uv=False)
    assert error(start(weight, of, 7), weight) == pytest.approx(
        float(np.sqrt((values[7:] ** 2).sum() / (values**2).sum()))
    )


@pytest.mark.parametrize(("kind", "shape", "transposed", "sites"), KINDS)
def test_objective_never_rises(
    kind: str, shape: tuple[int, ...], transposed: bool, sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, of = drawn(shape), structure(kind, shape, transposed, sites)
    step, seen = LBFGS._step, dict[int, list[float]]()

    def watched(descent: LBFGS) -> bool:
        values = seen.setdefault(id(descent), [descent.point.value])
        found = step(descent)
        values.append(descent.point.value)
        return found

    monkeypatch.setattr(LBFGS, "_step", watched)
    fit = fit_mera(weight, of, Truncation(3))
    assert len(seen) == 2
    for values in seen.values():
        assert values == sorted(values, reverse=True)
    assert fit.relative_error == pytest.approx(min(map(min, seen.values())) ** 0.5, rel=1e-6)
    assert fit.relative_error < 0.999 * error(start(weight, of, 3), weight)
    assert fit.relative_error == pytest.approx(error(form_of(fit.form.cores, of).to_weight(), weight))
    assert fit.form.bonds == (3,) and fit.entropies == []


@pytest.mark.slow
def test_recovers_a_mera() -> None:
    """Mostly: the descent may end elsewhere, at worse than the start it is not."""
    of = make_structure("linear", (64, 48), factors=((4, 4, 2, 2), (2, 2, 3, 4)), form="mera")
    errors = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        shapes = of.core_shapes((4,))
        cores = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        weight = form_of(cores, of).to_weight()
        errors.append(fit_mera(weight, of, Truncation(4)).relative_error)
        assert errors[-1] < error(start(weight, of, 4), weight) > 0.1
    assert sum(one < 1e-6 for one in errors) >= 3


def test_product_needs_bond_one() -> None:
    of = make_structure("linear", (16, 16), sites=4, form="mera")
    first, second, third, fourth = (drawn((2, 2), seed) for seed in range(4))
    weight = torch.kron(torch.kron(first, second), torch.kron(third, fourth))
    assert fit_mera(weight, of, Truncation(2)).relative_error < 1e-6


def test_is_seeded_and_cores_have_equal_norms() -> None:
    weight, of = drawn((24, 36)).float(), structure("linear", (24, 36), False, 4)
    once, again = (decompose(weight, of, Truncation(3), Target(seed=7)).form.cores for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    norms = [float(core.norm()) for core in once]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


def test_error_includes_rounding_to_half_precision() -> None:
    weight, of = drawn((16, 16)).half(), structure("linear", (16, 16), False, 3)
    fit = fit_mera(weight, of, Truncation(3))
    assert all(core.dtype == torch.float16 for core in fit.form.cores)
    cores = [core.double() for core in fit.form.cores]
    expected = error(form_of(cores, of).to_weight(), weight.double())
    assert fit.relative_error == pytest.approx(expected, rel=1e-3)


def test_fits_zeros() -> None:
    of = structure("linear", (24, 36), False, 4)
    fit = fit_mera(torch.zeros(24, 36), of, Truncation(2))
    assert fit.relative_error == 0 and not form_of(fit.form.cores, of).to_weight().any()


def test_two_sites_are_exact() -> None:
    weight, of = drawn((6, 4)), structure("linear", (6, 4), False, 2)
    assert fit_mera(weight, of, Truncation(1)).relative_error < 1e-12


def test_rejects_tolerances() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        fit_mera(drawn((24, 36)), structure("linear", (24, 36), False, 4), Truncation(3, tolerance=0.1))


@pytest.mark.parametrize("bond", [1, 2, 3, 4, 6])
def test_infers_the_bond_from_core_shapes(bond: int) -> None:
    """The order of the cores depends on it."""
    of = make_structure("linear", (96, 64), sites=5, form="mera")
    cores = [drawn(shape) for shape in of.core_shapes((bond,))]
    assert Mera(cores, of).bonds == (bond,)
