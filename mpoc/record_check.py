"""Whether what a file says of a layer can be: its counts, factors, bonds and geometry.  No torch here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpoc.geometry import Geometry
from mpoc.history import check_calibration, check_history
from mpoc.orders import MOST_ORDERED
from mpoc.spectrum import check_spectrum
from mpoc.structure import MOST_SITES, Structure
from mpoc.typed import made
from mpoc.wiring import num_bonds

if TYPE_CHECKING:
    from mpoc.manifest import LayerRecord, Manifest


_AXES = {"linear": (2,), "embedding": (2,), "experts": (3,), "convmap": (3, 4, 5)}
_AXES |= {f"conv{axes}d": (axes + 2,) for axes in (1, 2, 3)}
_LONGEST_LIST = 1000
_DTYPES = ("float64", "float32", "bfloat16", "float16")


def check_manifest(manifest: Manifest) -> None:
    """Compare the parts of a manifest, of layers that :func:`check_record` has yet to see, with each other.

    Raises:
        TypeError, ValueError: they contradict each other, or themselves.
    """
    for layer in manifest.layers:
        check_record(layer)
    check_names(manifest.layers)
    knots = manifest.tied.keys() & {*manifest.tied.values(), *(layer.name for layer in manifest.layers)}
    if knots:
        raise ValueError(f"{min(knots)!r} is tied to another tensor, and one itself")
    source, selected = manifest.source, sum(layer.num_original for layer in manifest.layers)
    if min(source.nbytes or 0, manifest.vectors) < 0 or source.num_parameters < selected:
        raise ValueError(f"{source}, {manifest.vectors} vectors, {selected} parameters in layers")
    check_history(manifest.training)
    check_calibration(manifest.calibration)


def check_names(layers: Sequence[LayerRecord]) -> None:
    """Every layer has its name, and the names of its cores, for itself.

    Raises:
        ValueError: two share one.
    """
    cores = Counter(layer.core_name(0) for layer in layers)
    if len(cores) < len(layers):
        raise ValueError(f"{cores.most_common(1)[0][0]!r} belongs to two layers")


def check_record(layer: LayerRecord) -> None:
    """Compare a record's fields, of a known kind and form, with each other.

    Raises:
        ValueError: they contradict each other.
    """
    check_made(layer)
    stored, padding = layer.num_original, (0, 0)
    if layer.form != "dense":
        stored, padding = sum(map(math.prod, layer.core_shapes)), layer.structure.padding
    if (layer.num_stored, layer.padding) != (stored, padding):
        raise ValueError(f"layer {layer.name!r}: {layer.num_stored} stored, padded by {layer.padding}")


def check_made(layer: LayerRecord) -> None:
    """As :func:`check_record`, but for what follows from the rest.

    Raises:
        ValueError: the fields contradict each other.
    """
    _check_sizes(layer)
    if layer.dtype not in _DTYPES or layer.stored_dtype not in _DTYPES:
        raise ValueError(f"layer {layer.name!r}: dtypes {layer.dtype!r} and {layer.stored_dtype!r}")
    if layer.same_size is not None and "this" not in layer.same_size:
        raise ValueError(f"layer {layer.name!r}: same_size = {layer.same_size!r}")
    if (layer.form == "svd+mpo") != (layer.low_rank != 0):
        raise ValueError(f"layer {layer.name!r}: form {layer.form!r}, low_rank = {layer.low_rank}")
    if layer.form != "dense":
        _check_factors(layer)


def _check_sizes(layer: LayerRecord) -> None:
    """First of all: what follows takes time by the numbers in these lists.

    Raises:
        ValueError: a list is too long, or of numbers below 1; or shape, kind and count do not agree.
    """
    lists = [value for key, value in vars(layer).items() if isinstance(value, tuple) and key != "order"]
    numbers = (*layer.shape, *layer.output_factors, *layer.input_factors, *layer.bonds)
    if max(map(len, lists)) > MOST_SITES + 2 or min(numbers, default=0) < 1:
        raise ValueError(f"layer {layer.name!r}: lists too long, or of numbers below 1")
    if len(layer.shape) not in _AXES[layer.kind] or math.prod(layer.shape) != layer.num_original:
        raise ValueError(f"layer {layer.name!r}: shape {layer.shape}, {layer.num_original} parameters")


def _check_factors(layer: LayerRecord) -> None:
    """Factors and bonds must make a network, and the network a matrix no smaller than the weight's.

    Raises:
        ValueError: they do not.
    """
    structure = layer.structure
    _check_spectra(layer)
    joined = are_joined(structure, layer.bonds)
    if layer.geometry is None:
        whole = structure.lead * structure.outputs * structure.inputs == layer.num_original
    else:
        whole = structure.num_original == layer.num_original
    whole = whole and (layer.kind == "convmap") == (layer.geometry is not None)
    front = structure.site_sizes[0] if joined and structure.lead_sites else 1
    if not (joined and whole and front == structure.lead and _modest(structure)):
        raise ValueError(f"layer {layer.name!r}: its factors and bonds do not make its weight")
    check_low_rank(structure, layer.low_rank)
    check_order(structure, layer.low_rank)


def check_order(structure: Structure, low_rank: int) -> None:
    """Whether a weight of ``structure`` can have its order of inputs.

    Raises:
        ValueError: it is no permutation of them, or not of a linear map that is one network of sites.
    """
    one_network = structure.kind == "linear" and structure.form != "svd" and not low_rank
    if structure.permutation is not None and not one_network:
        raise ValueError(
            f"an order of the inputs of a weight of kind {structure.kind}, form {structure.form}"
        )


def are_joined(structure: Structure, bonds: tuple[int, ...]) -> bool:
    """Whether outputs, inputs and bonds are of one number of sites; those of a whole map are a chain."""
    sites, is_chain = len(structure.output_factors), structure.network == "chain"
    if sites != len(structure.input_factors) or sites < 1 or (structure.geometry and not is_chain):
        return False
    ends = (bonds[0], bonds[-1]) if is_chain and bonds else (1, 1)
    return len(bonds) == num_bonds(structure.network, sites) and ends == (1, 1)


def _check_spectra(layer: LayerRecord) -> None:
    """One spectrum, or none, for each inner bond.

    Raises:
        ValueError: there are more or fewer, or one that cannot be.
    """
    if len(layer.spectra_of_weight) not in (0, len(layer.inner_bonds)):
        raise ValueError(f"layer {layer.name!r}: {len(layer.spectra_of_weight)} spectra of its weight")
    for spectrum in layer.spectra_of_weight:
        if spectrum is not None:
            check_spectrum(spectrum, math.prod(layer.structure.site_sizes))


def check_low_rank(structure: Structure, low_rank: int) -> None:
    """Whether a part of rank ``low_rank`` can be added to an MPO of ``structure``; 0: none is.

    Raises:
        ValueError: it is negative or above a side of the weight's matrix, or the weight is a whole map.
    """
    if low_rank and not 0 < low_rank <= min(structure.as_low_rank().site_sizes):
        raise ValueError(f"a part of rank {low_rank} added to a weight of shape {structure.shape}")


def _modest(structure: Structure) -> bool:
    """No more padding than factors are ever chosen with: a small file must not ask for a huge matrix."""
    sides = zip(structure.padding, (structure.outputs, structure.inputs), strict=True)
    return all(0 <= padding <= 0.1 * side for padding, side in sides)


def parse_geometry(value: dict[str, Any], shape: tuple[int, ...]) -> Geometry:
    """The geometry of a kernel of ``shape`` from JSON, checked.

    Raises:
        TypeError, ValueError: it is damaged.
    """
    geometry = made(Geometry, with_tuples(value))
    geometry.check(shape)
    return geometry


def with_tuples(value: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples, those within lists too.

    Raises:
        ValueError: one is longer than any that is needed: what is done with it takes time.
    """
    for key, item in value.items():
        if isinstance(item, list) and len(item) > (MOST_ORDERED if key == "order" else _LONGEST_LIST):
            raise ValueError(f"{key}: a list of {len(item)}")
    return {key: _as_tuple(item) for key, item in value.items()}


def _as_tuple(item: Any) -> Any:
    return tuple(map(_as_tuple, item)) if isinstance(item, list) else item
