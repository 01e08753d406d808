"""The manifest: what a compressed file says about itself, as plain data.  No torch here.

A single file holds it as JSON under the key ``mpoc`` of the safetensors header's metadata, a directory as
``mpoc.json``.  It has no times or dates, so that the same input gives the same bytes.  Annotations state
types, bounds and descriptions once: readers check against them, and the JSON Schema follows from them.
Schmidt spectra are thinned to at most ``MOST_POINTS`` points for each bond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, NotRequired, TypedDict, cast

from mpoc.io.safetensors_header import ITEMSIZE, TensorInfo
from mpoc.io.training_history import Measured
from mpoc.io.validation import NonNegative, Positive, Whole, json_text
from mpoc.quantize.storage import GRID_BITS, Grid, Storage, packed_words, storage_from_json
from mpoc.tensor_networks.forms import FORMS
from mpoc.tensor_networks.geometry import Geometry
from mpoc.tensor_networks.structure import KINDS, Structure, low_rank_structure

# (index from 1, Schmidt value) pairs, the squares of all values of the bond summing to 1.
Spectrum = tuple[tuple[Positive, NonNegative], ...]
Sizes = tuple[Positive, ...]

MOST_POINTS = 32

FORMAT = 2
READABLE_FORMATS = (1, FORMAT)
# Of a quantization_config: plain; with an order of inputs, with storage, which earlier versions pass over.
CONFIG_FORMAT, ORDERED_FORMAT, STORED_FORMAT = 1, 2, 3
DENSE = "dense"  # the form of a layer that was left as it is
HALF = "float16"
MANIFEST_FILE = "mpoc.json"
# Fields of layers that a manifest states once.
COMMON = ("kind", "dtype", "stored_dtype", "storage")


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


class StorageRecord(TypedDict):
    """How the numbers of one tensor are stored: see :mod:`mpoc.quantize.storage`."""

    kind: Annotated[str, ("enum", ("grid", "coded"))]
    bits: NotRequired[Annotated[int, ("enum", GRID_BITS), "of a code of a grid"]]
    group: NotRequired[Annotated[Positive | None, "columns that share a scale; null: the row"]]
    symmetric: NotRequired[Annotated[bool, "a grid without zero points"]]


def storage_record(storage: Storage) -> StorageRecord:
    """A storage as a record holds it."""
    return cast(StorageRecord, storage.as_json())


@dataclass(frozen=True)
class CodedPart:
    """A tensor of a layer that is stored as codes: a core, or the weight of a layer that stays dense.

    The codes form a matrix (rows, columns): of a weight (outputs, inputs), taps among the inputs and experts
    among the outputs; of a core, its first half of axes and its second.
    """

    name: str
    shape: tuple[int, ...]
    structure: Structure | None  # how a dense weight becomes a matrix; None: a core
    storage: Storage

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns)."""
        if self.structure is not None:
            return self.structure.outputs, self.structure.inputs
        half = len(self.shape) // 2
        return math.prod(self.shape[:half]), math.prod(self.shape[half:])

    def file_infos(self, length: int) -> list[TensorInfo]:
        """The tensors of the file that hold the codes; ``length``: bytes of a coded stream."""
        if not isinstance(self.storage, Grid):
            return [TensorInfo(f"{self.name}_coded", "uint8", (length,))]
        (rows, columns), bits = self.sides, self.storage.bits
        groups = self.storage.groups(columns)
        kinds = {
            "packed": ("int32", (rows, packed_words(columns, bits))),
            "scale": ("float16", (rows, groups)),
            "zero_point": ("int32", (packed_words(rows, bits), groups)),
            "shape": ("int64", (2,)),
        }
        if self.storage.symmetric:
            del kinds["zero_point"]
        return [TensorInfo(f"{self.name}_{end}", *kind) for end, kind in kinds.items()]

    @property
    def file_names(self) -> list[str]:
        """The names of these tensors."""
        return [info.name for info in self.file_infos(0)]


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

    storage: Annotated[
        tuple[StorageRecord, ...], "of each core, or of the dense weight; empty: all are floats"
    ] = ()
    nbytes: Annotated[Whole | None, "stored in the weight's place, where it is not floats"] = None

    @property
    def layer(self) -> str:
        """The name without ``.weight``."""
        return self.name.removesuffix(".weight")

    @property
    def rho(self) -> float:
        """N_stored / N_ori."""
        return self.num_stored / self.num_original

    @property
    def is_changed(self) -> bool:
        """Whether the file holds something else than the weight as it was: cores, or codes."""
        return self.form != DENSE or bool(self.storage)

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored in the weight's place."""
        return self.num_stored * ITEMSIZE[self.stored_dtype] if self.nbytes is None else self.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over the weight's own numbers."""
        return 8 * self.stored_bytes / self.num_original

    @property
    def storage_text(self) -> str:
        """How the numbers are stored, for people: ``float32``, ``grid 4`` or ``coded``."""
        kinds = (" ".join(map(str, filter(None, (part["kind"], part.get("bits"))))) for part in self.storage)
        return " + ".join(dict.fromkeys(kinds)) or self.stored_dtype

    @property
    def coded_parts(self) -> list[CodedPart]:
        """The tensors that are stored as codes; none where all are floats.

        Raises:
            UsageError: a storage contradicts itself.
            ValueError: there are more or fewer storages than tensors.
        """
        if not self.storage:
            return []
        if self.form == DENSE:
            whole = low_rank_structure(self.kind, self.shape, self.transposed)
            tensors: list[tuple[str, tuple[int, ...], Structure | None]] = [(self.name, self.shape, whole)]
        else:
            cores = zip(self.core_names, self.core_shapes, strict=True)
            tensors = [(name, shape, None) for name, shape in cores]
        storages = [cast(Storage, storage_from_json(storage)) for storage in self.storage]
        return [CodedPart(*tensor, storage) for tensor, storage in zip(tensors, storages, strict=True)]

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
    def file_names(self) -> list[str]:
        """The names of all tensors in the file that stand for the weight, where it is changed."""
        return [name for part in self.coded_parts for name in part.file_names] or self.core_names

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
    measured: Annotated[Measured, "scores of compress --eval; none or empty: it was not measured"] = field(
        default_factory=Measured
    )
    halved: Annotated[str, ("enum", ("", "float32")), "what readers get for vectors stored as float16"] = ""

    @property
    def is_complete(self) -> bool:
        """False where transformers saved the directory again: errors and what was selected are not known."""
        return self.source.fingerprint is not None

    @property
    def replaced(self) -> list[LayerRecord]:
        """The layers that are stored as cores."""
        return [layer for layer in self.layers if layer.form != DENSE]

    @property
    def changed(self) -> list[LayerRecord]:
        """The layers that are stored as cores or as codes."""
        return [layer for layer in self.layers if layer.is_changed]

    @property
    def rho(self) -> float:
        """Eq. (9): Σ N_mpo / Σ N_ori over the replaced layers; 1 where there are none."""
        return _ratio(self.replaced)

    @property
    def rho_selected(self) -> float:
        """The same sum over all selected layers, those left dense included (of no use if not complete)."""
        return _ratio(self.layers)

    @property
    def selected_bytes(self) -> tuple[int, int]:
        """Bytes of the weights of all selected layers, before and as stored."""
        before = sum(layer.num_original * ITEMSIZE[layer.dtype] for layer in self.layers)
        return before, sum(layer.stored_bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the selected layers over the numbers of their weights; 0 where there are none."""
        original = sum(layer.num_original for layer in self.layers)
        return 8 * self.selected_bytes[1] / original if original else 0.0

    @property
    def num_parameters(self) -> int:
        """Whole model, as stored."""
        saved = sum(layer.num_original - layer.num_stored for layer in self.layers)
        return self.source.num_parameters - saved

    def as_read(self, info: TensorInfo) -> TensorInfo:
        """A tensor of the file that belongs to no layer, with the dtype that readers get."""
        halved = self.halved and info.dtype == HALF and len(info.shape) <= 1
        return replace(info, dtype=self.halved) if halved else info

    def to_json(self, indent: int | None = None) -> str:
        """The text that is stored."""
        value = {"format": FORMAT, **asdict(self)}
        value["layers"] = [compact(layer) for layer in self.layers]
        if any(layer.storage for layer in self.layers):  # small files, of which the manifest is a part
            value["common"] = _take_common(value["layers"])
        for name in ("architecture", "training", "calibration", "measured", "halved"):
            if not value[name]:
                del value[name]
        return json_text(value, indent)


def _ratio(layers: tuple[LayerRecord, ...] | list[LayerRecord]) -> float:
    original = sum(layer.num_original for layer in layers)
    return sum(layer.num_stored for layer in layers) / original if original else 1.0


def compact(layer: LayerRecord) -> dict[str, Any]:
    """A record without the fields that have their default value."""
    defaults = {f.name: f.default for f in fields(layer)}
    return {key: value for key, value in asdict(layer).items() if value != defaults[key]}


def _take_common(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Take from layers what most have in common, and counts that follow from shapes."""
    common = {}
    for key in COMMON:
        values = [layer.setdefault(key, ()) for layer in layers]
        common[key] = max(values, key=values.count)
    for layer in layers:
        follow = {"num_stored", "num_original"} if layer["num_stored"] == layer["num_original"] else set()
        for key in follow | {key for key in COMMON if layer[key] == common[key]}:
            del layer[key]
    return common
