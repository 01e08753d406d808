"""Schmidt spectra of a weight at every cut of its chain of sites (Gao et al. 2020, section IV).

The interleaved tensor (J_1 I_1, J_2 I_2, …) is cut after site k into two halves. The singular values s of
that unfolding, with p = s²/Σs², give the entanglement entropy S_k = −Σ p ln p, at most ln of the smaller
half, and the bond D_k that an MPO needs there.

For a dense weight, s² are the eigenvalues of the smaller half's Gram matrix, formed in float64 block by
block: exact up to rounding, while Schmidt values below 1e-8 of the largest are noise. For cores, s come from
the canonical form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.tensor_networks.fit.conv_map import exact_map
from mpoc.tensor_networks.fit.truncation import gram
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import interleave
from mpoc.tensor_networks.forms.mpo import MPO, entropy, rank_within
from mpoc.tensor_networks.structure import Structure


@dataclass(frozen=True)
class Cut:
    """Entropy and spectrum of the weight at one cut."""

    site: int  # the cut is after this site, from 1
    full_bond: int  # dimension of the smaller half: the bond at which nothing is discarded
    entropy: float  # S, in nats
    effective_bond: int  # the smallest bond that keeps the requested share of Σs²
    spectrum: tuple[float, ...]  # Schmidt values, descending, with Σs² = 1; D_k values for cores

    @property
    def largest_entropy(self) -> float:
        """ln of the smaller half's dimension: S of a flat spectrum."""
        return math.log(self.full_bond)


def cuts_of_weight(weight: Tensor, structure: Structure, kept: float) -> list[Cut]:
    """Every cut of a dense weight.

    Args:
        weight: a tensor of shape ``structure.shape``, of any floating dtype.
        structure: its factors, padding and lead site.
        kept: share of Σs², between 0 and 1, that the effective bond keeps.
    """
    return _cuts(schmidt_spectra(weight, structure), structure, kept)


def cuts_of_cores(cores: Sequence[Tensor], structure: Structure, kept: float) -> list[Cut]:
    """Every cut of stored cores: from the canonical form of a chain, or else from the weight.

    Args:
        cores: the cores in the order of ``structure.cores``.
        structure: a structure of any form; the cuts are those of a chain of its sites.
        kept: as in :func:`cuts_of_weight`.

    Raises:
        ValueError: cores and structure do not fit.
    """
    form = form_of(cores, structure)
    if isinstance(form, MPO):
        return _cuts(form.spectra(), structure, kept)
    return cuts_of_weight(form.double().to_weight(), structure, kept)


def schmidt_spectra(weight: Tensor, structure: Structure) -> list[Tensor]:
    """Singular values of every unfolding of the interleaved weight, float64, descending.

    Memory: the tensor, a copy if it is not interleaved yet, and the Gram matrix of the smaller half.
    """
    if structure.is_large_map:
        return exact_map(weight, structure).spectra()
    tensor = interleave(weight, structure)
    left, spectra = 1, []
    for size in structure.site_sizes[:-1]:
        left *= size
        unfolding = tensor.reshape(left, -1)
        wide = unfolding if left <= unfolding.shape[1] else unfolding.T
        squares = torch.linalg.eigvalsh(gram(wide, torch.float64))
        spectra.append(squares.clamp(min=0).sqrt().flip(0))
    return spectra


def _cuts(spectra: list[Tensor], structure: Structure, kept: float) -> list[Cut]:
    sizes = structure.site_sizes
    halves = [(math.prod(sizes[:site]), math.prod(sizes[site:])) for site in range(1, len(sizes))]
    return [
        _cut(site, min(sides), values, kept)
        for site, (sides, values) in enumerate(zip(halves, spectra, strict=True), start=1)
    ]


def _cut(site: int, full_bond: int, values: Tensor, kept: float) -> Cut:
    total = float(values.square().sum())
    normalised = values / math.sqrt(total) if total else values
    bond, _ = rank_within(normalised, full_bond, 1 - kept)
    return Cut(site, full_bond, entropy(values), bond, tuple(normalised.tolist()))
