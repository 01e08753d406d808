"""JSON Schemas (2020-12) of reports, tables of sizes and manifests, for other programs.  No torch here.

They are generated from the annotations of the manifest's dataclasses and of the types below.  Fields that
they do not name are allowed: later versions add some.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from mpoc.errors import UsageError, nearest
from mpoc.io.manifest import COMMON, READABLE_FORMATS, LayerRecord, Manifest
from mpoc.io.training_history import Measured
from mpoc.io.validation import NonNegative, Whole, json_schema

NAMES = ("report", "manifest", "sizes")
SIZES = "mpoc.sizes/1"
# Fields of the manifest that a report repeats.
_REPEATED = (
    *("source", "options", "tool", "kinds_from", "architecture", "training", "calibration"),
    *("left_alone", "tied"),
)
# Fields of a layer that reports of earlier versions lack.
_ADDED_LATER = ("order", "spectra_of_weight", "storage", "nbytes")
_Ratio = Annotated[float, ("exclusiveMinimum", 0)]
_Scores = dict[str, float | None]


class _Totals(TypedDict):
    rho: Annotated[NonNegative, "parameters after over before, over the replaced layers"]
    rho_selected: Annotated[NonNegative | None, "the same over all selected layers"]
    layers_replaced: Whole
    layers_selected: Whole | None
    parameters_replaced_before: Whole
    parameters_replaced_after: Whole
    parameters_before: Whole
    parameters_after: Whole
    bytes_before: Whole | None
    bytes_after: Whole
    bytes_selected_before: NotRequired[Annotated[Whole, "weights of the selected layers"]]
    bytes_selected_after: NotRequired[Annotated[Whole, "what is stored in their place"]]
    bits_per_weight: NotRequired[Annotated[NonNegative, "the same in bits, over the numbers before"]]


class _LayerExtras(TypedDict):
    layer: Annotated[str, "the name without .weight"]
    rho: _Ratio
    stored_as: NotRequired[Annotated[str, "for people: a dtype, grid 4, or coded"]]
    bits_per_weight: NotRequired[Annotated[NonNegative, "stored bits over the numbers of the weight"]]
    seconds: NotRequired[Annotated[NonNegative, "of the fit; after compress only"]]


class _Evaluation(TypedDict):
    schema: Literal["mpoc.eval/1"]
    model: str
    reference: NotRequired[str]
    data: str
    split: str
    examples: Whole
    device: str
    metric: Annotated[str, "the score that counts"]
    scores: _Scores
    examples_per_second: float


class _BeforeAndAfter(TypedDict):
    before: _Evaluation
    after: _Evaluation


class _Trial(TypedDict):
    ratio: NotRequired[Annotated[_Ratio, ("maximum", 1), "that was asked for"]]
    size: NotRequired[Annotated[_Ratio, ("maximum", 1), "of the source's weight files, that was asked for"]]
    nbytes: Whole
    scores: _Scores
    drop: Annotated[float | None, "of the metric, in its unit"]
    kept: bool
    chosen: bool


class _ReportExtras(TypedDict):
    schema: Literal["mpoc.report/1"]
    headline: NotRequired[Annotated[str, "for people: what the network keeps; empty where it is not known"]]
    measured: NotRequired[Measured]
    totals: _Totals
    vectors_left_alone: Whole
    written: NotRequired[Annotated[str | None, "after compress: the output; null for a dry run"]]
    evaluation: NotRequired[Annotated[_BeforeAndAfter, "after compress --eval: what mpoc eval --json prints"]]
    search: NotRequired[Annotated[list[_Trial], "after compress --max-drop: what was tried, in that order"]]


class _SizedSource(TypedDict):
    name: str
    nbytes: Annotated[Whole, "of its weight files"]


class _SizeRow(TypedDict):
    share: Annotated[_Ratio, "of the source's weight files, that was asked for"]
    nbytes: Annotated[Whole, "of the weight files, at most"]
    bits_per_weight: NonNegative
    likeness: Annotated[dict[str, dict[str, float]], "of outputs to the dense ones: by way, this among them"]
    relative_error: Annotated[NonNegative | None, "of all selected weights, without calibration"]
    command: Annotated[str, "that writes this size"]


class _Sizes(TypedDict):
    schema: Literal["mpoc.sizes/1"]
    source: _SizedSource
    calibration: Annotated[dict[str, Any], "as in a manifest; empty without data"]
    rows: Annotated[list[_SizeRow], "by falling size"]


def schema(name: str) -> dict[str, Any]:
    """The schema of ``mpoc report --json`` ("report"), of a compressed file's manifest ("manifest"), or of
    what ``mpoc compress MODEL --json`` prints without a goal ("sizes").

        >>> report = mpoc.read_report("digits-cnn.mpo.safetensors")
        >>> jsonschema.validate(json.loads(report.to_json()), schema("report"))

    Returns:
        The schema, complete in itself.

    Raises:
        UsageError: another name.
    """
    if name not in NAMES:
        raise UsageError(f"no schema of {name!r}{nearest(name, NAMES)}", f"one of {', '.join(NAMES)}")
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | {"report": _report, "manifest": _manifest, "sizes": _sizes}[name]()


def _sizes() -> dict[str, Any]:
    title = "What mpoc compress MODEL --json prints without a goal"
    return {"title": title, **json_schema(_Sizes)}


def _manifest() -> dict[str, Any]:
    schema = json_schema(Manifest)
    layer = schema["properties"]["layers"]["items"]
    common = {"type": "object", "properties": {key: layer["properties"][key] for key in COMMON}}
    schema["properties"]["common"] = common | {"description": "fields of all layers that do not have them"}
    layer["required"] = ["name", "shape", "form"]
    return {
        "title": "What a file compressed by mpoc says of itself",
        "description": "The text under the key mpoc of a safetensors file's metadata, or mpoc.json in a "
        "directory. A layer leaves out fields that have their default, and those of common; without "
        "counts they are the product of its shape.",
        **schema,
        "properties": {"format": {"enum": list(READABLE_FORMATS)}, **schema["properties"]},
        "required": ["format", *schema["required"]],
    }


def _report() -> dict[str, Any]:
    extras, manifest = json_schema(_ReportExtras), _manifest()["properties"]
    properties = extras["properties"] | {name: manifest[name] for name in _REPEATED}
    return {
        "title": "What mpoc report --json and mpoc compress --json print",
        **extras,
        "properties": {**properties, "layers": {"type": "array", "items": _layer()}},
        "required": [*extras["required"], *_REPEATED, "layers"],
    }


def _layer() -> dict[str, Any]:
    """A row of the report: a record with all of its fields, and what follows from them."""
    record, extras = json_schema(LayerRecord), json_schema(_LayerExtras)
    complete = [name for name in record["properties"] if name not in _ADDED_LATER]
    return {
        **record,
        "properties": record["properties"] | extras["properties"],
        "required": [*complete, *extras["required"]],
    }
