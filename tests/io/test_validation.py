"""Values are checked against annotations as jsonschema checks them against the schema of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mpoc.io.validation import NonNegative, Positive, Whole, build_dataclass, check_fields, json_schema


class Inner(TypedDict):
    rank: Positive
    note: NotRequired[str | None]


@dataclass(frozen=True)
class Outer:
    count: Annotated[Whole, "how many"]
    share: Annotated[float, ("exclusiveMinimum", 0), ("maximum", 1)]
    form: Annotated[str, ("enum", ("mpo", "svd"))] = "mpo"
    error: NonNegative | None = None
    scores: Annotated[dict[str, float | None] | None, "by name"] = None
    inner: Inner | None = None
    names: Annotated[dict[str, str], ("oneKeyOf", ("zoo", "factory"))] | None = None
    anything: Any = None


SCHEMA = json_schema(Outer)
NUMBERS = st.integers(-3, 3) | st.sampled_from([-0.5, 0.25, 0.5, 1.5])
LEAVES = st.none() | st.booleans() | NUMBERS | st.sampled_from(["mpo", "svd", "tree"])
KEYS = st.sampled_from(["zoo", "factory", "rank", "note", "other"])
VALUES = LEAVES | st.dictionaries(KEYS, LEAVES, max_size=3)


def is_accepted(values: dict[str, Any]) -> bool:
    try:
        build_dataclass(Outer, values)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.slow
@given(st.sampled_from(list(SCHEMA["properties"])), VALUES)
def test_accepts_what_the_schema_accepts(name: str, value: Any) -> None:
    values = {"count": 1, "share": 0.5, name: value}
    assert is_accepted(values) == Draft202012Validator(SCHEMA).is_valid(values)


def test_a_schema_says_what_annotations_say() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["required"] == ["count", "share"]
    assert SCHEMA["properties"]["count"] == {"type": "integer", "minimum": 0, "description": "how many"}
    assert json_schema(tuple[Whole, Whole]) == {
        "type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2,
    }  # fmt: skip
    assert json_schema(tuple[int, str])["prefixItems"] == [{"type": "integer"}, {"type": "string"}]
    assert json_schema(Literal["a"]) == {"const": "a"}


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"count": -1}, "count = -1"),
        ({"count": True}, "count = True"),
        ({"count": 1 << 63}, "count = "),
        ({"share": float("nan")}, "share = nan"),
        ({"error": float("inf")}, "error = inf"),
        ({"form": "tree"}, "form = 'tree'"),
        ({"bond": 3}, "field 'bond' is not known"),
    ],
)
def test_an_error_names_the_field(changed: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{error}"):
        build_dataclass(Outer, {"count": 1, "share": 0.5, **changed})


def test_other_fields_of_a_dictionary_are_allowed() -> None:
    check_fields({"rank": 1, "more": "text"}, Inner)
    with pytest.raises(TypeError, match="rank = 0"):
        check_fields({"rank": 0}, Inner)
    with pytest.raises(TypeError):
        check_fields(["rank"], Inner)
