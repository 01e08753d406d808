"""``--input-shape``: its text, and which of several counts."""

import pytest

from mpoc.compression.recipe_syntax import InputShape, geometry_at, parse_input_shape
from mpoc.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2x2", InputShape(None, (2, 2))),
        ("conv5_1=2x2", InputShape("conv5_1", (2, 2))),
        ("re:^c.*[12]$=100", InputShape("re:^c.*[12]$", (100,))),
        ("c=8x8x4:stride=2", InputShape("c", (8, 8, 4), stride=(2,))),
        (
            "c*=8x6:stride=2x1,padding=1,dilation=1x3,groups=4,padding_mode=circular",
            InputShape("c*", (8, 6), (2, 1), (1,), (1, 3), 4, "circular"),
        ),
        ("2x2:padding=0", InputShape(None, (2, 2), padding=(0,))),
    ],
)
def test_parses_input_shapes(text: str, expected: InputShape) -> None:
    assert parse_input_shape(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("c=", "not an input shape"),
        ("c=2*2", "not an input shape"),
        ("=2x2", "not an input shape"),
        ("c=2x2:", "not an input shape"),
        ("c=2x2:strid=1", "unknown setting 'strid'; did you mean 'stride'"),
        ("c=2x2:stride=a", "'a' is neither a number"),
        ("c=2x2:groups=2x2", "groups must be one number"),
    ],
)
def test_rejects_malformed_input_shapes(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_input_shape(text)


def test_last_matching_shape_wins() -> None:
    given = [parse_input_shape(text) for text in ("8x8", "conv*=4x4", "conv2=2x2", "other=3x3")]
    assert geometry_at("conv1.weight", (4, 4, 3, 3), given).size == (4, 4)
    assert geometry_at("conv2.weight", (4, 4, 3, 3), given).size == (2, 2)
    assert geometry_at("first.weight", (4, 4, 3, 3), given).size == (8, 8)
    with pytest.raises(UsageError, match="needs its input size") as caught:
        geometry_at("first.weight", (4, 4, 3, 3), given[1:])
    assert "--input-shape first=HxW" in (caught.value.hint or "")
