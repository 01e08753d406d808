"""The manifest: what a compressed file says about itself, as plain data.  No torch here.

A single file holds it as JSON under the key ``mpoc`` of the safetensors header's metadata, a directory as
``mpoc.json``.  It has no times or dates, so that the same input gives the same bytes.  Annotations state
types, bounds and descriptions once: readers check against them, and the JSON Schema follows from them.
Schmidt spectra are thinned to at most ``MOST_POINTS`` points for each bond.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from mpoc.io.validation import NonNegative, Positive, Whole, json_text
from mpoc.tensor_networks.forms import FORMS
from mpoc.tensor_networks.geometry import Geometry
from mpoc.tensor_networks.structure import KINDS, Structure

# (index from 1, Schmidt value) pairs, the squares of all values of the bond summing to 1.
Spectrum = tuple[tuple[Positive, NonNegative], ...]
Sizes = tuple[Positive, ...]

MOST_POINTS = 32

FORMAT = 1
# Of a quantization_config in which a layer has an order: 0.1.0 passes over fields that it does not know.
ORDERED_FORMAT = 2
DENSE = "dense"  # the form of a layer that was left as it is
MANIFEST_FILE = "mpoc.json"


def form_names() -> tuple[str, ...]:
    """The names of all forms that a layer can have."""
    return (*FORMS, DENSE)


def thinned(values: Sequence[float], kept: int) -> Spectrum:
    """At most ``MOST_POINTS`` of a bond's Schmidt values, evenly spaced on a logarithmic index.

    Args:
        values: all of them, descending, of any norm.
        kept: how many a truncation keeps, 1 ≤ kept ≤ their number.

    Returns:
        The first, the last that is kept and the last of all are always among them; six significant digits.
        None of a weight of zeros.
    """
    norm = math.sqrt(math.fsum(value * value for value in values))
    if norm == 0.0:
        return ()
    indices = _indices(len(values), kept)
    return tuple((index, float(f"{values[index - 1] / norm:.6g}")) for index in indices)


def longest(count: int, figure: float) -> Spectrum:
    """The longest spectrum that :func:`thinned` can return for ``count`` values, to predict a size."""
    return ((count, figure),) * min(count, len(_indices(count, 1)) + 1)


def _indices(count: int, kept: int) -> list[int]:
    steps = MOST_POINTS - 2
    spaced = {round(count ** (step / steps)) for step in range(steps + 1)}
    return list(range(1, count + 1)) if count <= MOST_POINTS else sorted(spaced | {kept})


def check_spectrum(spectrum: Spectrum, longest: int) -> None:
    """Check that these can be points of a bond's spectrum of at most ``longest`` values.

    Raises:
        ValueError: they cannot be.
    """
    indices, values = [index for index, _ in spectrum], [value for _, value in spectrum]
    rising = all(before < after for before, after in itertools.pairwise(indices))
    falling = all(before >= after for before, after in itertools.pairwise(values))
    within = 0 < len(spectrum) <= MOST_POINTS and indices[0] == 1 and indices[-1] <= longest
    if not (within and rising and falling and values[0] <= 1.0 and values[-1] >= 0.0):
        raise ValueError(f"a spectrum of {len(spectrum)} points, from {spectrum[:1]} to {spectrum[-1:]}")


@dataclass(frozen=True)
class LayerRecord:
    """One selected layer: what it was and what is stored."""

    name: Annotated[str, "of the weight in the source, e.g. layer1.0.conv1.weight"]
    kind: Annotated[str, ("enum", KINDS)]
    shape: Annotated[Sizes, "of the weight in the source"]
    dtype: Annotated[str, "of the weight in the source, as torch names it"]
    form: Annotated[str, ("enum", form_names)]
    num_original: Annotated[Positive, "N_ori: numbers in the weight"]
    num_stored: Annotated[Positive, "N_mpo: numbers stored in its place; N_ori where dense"]
    stored_dtype: str
    reason: Annotated[str, "why dense"] = ""
    transposed: Annotated[bool, "the source stores (inputs, outputs)"] = False
    output_factors: Annotated[Sizes, "J_1..J_n, one for each site"] = ()
    input_factors: Annotated[Sizes, "I_1..I_n, one for each site"] = ()
    bonds: Annotated[Sizes, "D_0..D_n of a chain; one for each branch of a tree; one of a MERA"] = ()
    low_rank: Annotated[Whole, "rank of the low-rank part of a sum, else 0"] = 0
    padding: Annotated[tuple[Whole, Whole], "zero rows and columns added"] = (0, 0)
    relative_error: Annotated[
        NonNegative | None,
        "of the weight as stored: Frobenius norm of the difference over that of the weight; "
        "null in a plan and where dense",
    ] = None
    entropies: Annotated[
        tuple[float, ...], "entanglement entropy of the stored weight at each inner bond; of a sum none"
    ] = ()
    entropies_of_weight: Annotated[
        tuple[float | None, ...], "the same before truncation, where computed exactly"
    ] = ()
    spectra_of_weight: Annotated[
        tuple[Spectrum | None, ...],
        "at each inner bond some of the weight's Schmidt values, as (index from 1, value; all squares sum to "
        "1), where they are known and some were cut off",
    ] = ()
    geometry: Annotated[Geometry | None, "of a convolution taken as one map (kind convmap), else null"] = None
    order: Annotated[
        str | tuple[Whole, ...], "of the inputs: empty, morton:HxW, or the permutation; in a plan learned too"
    ] = ""
    # ‖Wx − Ŵx̃‖ / ‖Wx‖ about the mean, x̃ the inputs that the compressed network gives.
    output_error: Annotated[
        NonNegative | None, "calibrated: relative error of the outputs, on the inputs of the fit"
    ] = None
    held_out_error: Annotated[NonNegative | None, "calibrated: the same on held-out inputs"] = None
    same_size: Annotated[
        dict[str, float] | None,
        "calibrated: held-out error as the network's output feels it, of this and of other methods at the "
        "same size",
    ] = None

    @property
    def layer(self) -> str:
        """The name without ``.weight``."""
        return self.name.removesuffix(".weight")

    @property
    def rho(self) -> float:
        """N_stored / N_ori."""
        return self.num_stored / self.num_original

    @property
    def structure(self) -> Structure:
        """How the cores make the weight; not for dense layers."""
        factors = self.output_factors, self.input_factors
        return Structure(
            self.kind, self.shape, self.transposed, *factors, self.geometry, self.form, self.order
        )

    @property
    def num_cores(self) -> int:
        """Number of cores in all parts of the form; 0 for a dense layer."""
        return len(self.core_shapes) if self.form != DENSE else 0

    @property
    def core_names(self) -> list[str]:
        """The tensor names of all cores, in order."""
        return [self.core_name(k) for k in range(self.num_cores)]

    @property
    def core_shapes(self) -> list[tuple[int, ...]]:
        """Their shapes; not for dense layers."""
        return self.structure.core_shapes(self.all_bonds)

    @property
    def all_bonds(self) -> tuple[int, ...]:
        """The bonds of all parts of the form, as its structure orders them."""
        return (*self.bonds, 1, self.low_rank, 1) if self.low_rank else self.bonds

    @property
    def inner_bonds(self) -> tuple[int, ...]:
        """The bonds between two cores; of a sum those of its first part."""
        return FORMS[self.form].topology.inner_bonds(self.bonds) if self.form != DENSE else ()

    def bonds_text(self, between: str = " ") -> str:
        """The inner bonds for people, as ``4 8 4``, or ``48 + r 12`` with an added part of rank 12."""
        added = f"r {self.low_rank}" if self.low_rank else ""
        return " + ".join(filter(None, [between.join(map(str, self.inner_bonds)), added]))

    def core_name(self, site: int) -> str:
        """The tensor name of core ``site`` (from 0)."""
        return f"{core_prefix(self.name)}.{site}"


def bond_fields(structure: Structure, bonds: tuple[int, ...]) -> dict[str, Any]:
    """The fields of a record that hold the bonds of a form: ``bonds``, and ``low_rank`` of a sum."""
    first, *added = structure.split_bonds(bonds)
    return {"bonds": first, "low_rank": added[0][1] if added else 0}


def core_prefix(name: str) -> str:
    """``fc.weight`` → ``fc.cores``; any other parameter ``m.weight_ih`` → ``m.weight_ih_cores``."""
    if name == "weight" or name.endswith(".weight"):
        return name.removesuffix("weight") + "cores"
    return name + "_cores"


@dataclass(frozen=True)
class Source:
    """The checkpoint that was compressed; None: not recorded."""

    name: str | None
    nbytes: Annotated[Whole | None, "of its weight files and, in a directory, of the other files kept"]
    num_parameters: Whole
    fingerprint: Annotated[str | None, "SHA-256 over names, dtypes and shapes"]


@dataclass(frozen=True)
class Manifest:
    """Everything that a report needs, and that loading needs beside the tensors."""

    source: Annotated[Source, "the checkpoint that was compressed; null: not recorded"]
    layers: Annotated[tuple[LayerRecord, ...], "every selected layer, in the source's order"]
    options: Annotated[dict[str, Any], "the options"]
    kinds_from: Annotated[str, "source of the kinds of layers: config.json (bert), or names and shapes"]
    left_alone: Annotated[dict[str, str], "matrix or unused tensor: reason"] = field(default_factory=dict)
    vectors: Annotated[Whole, "other tensors left alone"] = 0
    tied: Annotated[dict[str, str], "name: the name that holds its data"] = field(default_factory=dict)
    tool: Annotated[str, "mpoc and its version"] = ""
    architecture: Annotated[
        dict[str, str],
        ("oneKeyOf", ("zoo", "factory")),
        "the dense network, where one was named: resnet:depth=56 of the zoo, or a factory net.py:net",
    ] = field(default_factory=dict)
    training: Annotated[dict[str, Any], "what mpoc finetune did; none or empty: nothing"] = field(
        default_factory=dict
    )
    calibration: Annotated[dict[str, Any], "on what the fit was made; none or empty: on weights alone"] = (
        field(default_factory=dict)
    )

    @property
    def is_complete(self) -> bool:
        """False where transformers saved the directory again: errors and what was selected are not known."""
        return self.source.fingerprint is not None

    @property
    def replaced(self) -> list[LayerRecord]:
        """The layers that are stored as cores."""
        return [layer for layer in self.layers if layer.form != DENSE]

    @property
    def rho(self) -> float:
        """Eq. (9): Σ N_mpo / Σ N_ori over the replaced layers; 1 where there are none."""
        return _ratio(self.replaced)

    @property
    def rho_selected(self) -> float:
        """The same sum over all selected layers, those left dense included (of no use if not complete)."""
        return _ratio(self.layers)

    @property
    def num_parameters(self) -> int:
        """Whole model, as stored."""
        saved = sum(layer.num_original - layer.num_stored for layer in self.layers)
        return self.source.num_parameters - saved

    def to_json(self, indent: int | None = None) -> str:
        """The text that is stored."""
        value = {"format": FORMAT, **asdict(self)}
        value["layers"] = [_compact(layer) for layer in self.layers]
        for name in ("architecture", "training", "calibration"):
            if not value[name]:
                del value[name]
        return json_text(value, indent)


def _ratio(layers: tuple[LayerRecord, ...] | list[LayerRecord]) -> float:
    original = sum(layer.num_original for layer in layers)
    return sum(layer.num_stored for layer in layers) / original if original else 1.0


def _compact(layer: LayerRecord) -> dict[str, Any]:
    """A record without the fields that have their default value."""
    defaults = {f.name: f.default for f in fields(layer)}
    return {key: value for key, value in asdict(layer).items() if value != defaults[key]}


def record_to_json(layer: LayerRecord) -> str:
    """A single record as JSON text."""
    return json.dumps(_compact(layer), ensure_ascii=False)
