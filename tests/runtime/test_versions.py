from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mpoc.runtime.packages import is_later, is_within, release

RELEASES = ["0.1", "0.1.0", "0.9", "0.10", "1.0", "1.0.1", "2.6", "2.6.1", "2.13.0", "2.14", "10.2"]


@pytest.mark.parametrize("version", RELEASES)
def test_compares_releases_like_packaging(version: str) -> None:
    for other in RELEASES:
        assert is_later(version, other) == (Version(version) > Version(other))
        for bounds in (f">={other}", f"<{other}", f"=={other}", f"!={other}", f"<{other},>=0.9", ""):
            assert is_within(version, bounds) == (Version(version) in SpecifierSet(bounds))


def test_ignores_version_suffixes() -> None:
    assert release("2.13.0+cpu") == release("2.13.0rc1") == (2, 13)
    assert is_within("2.13.0+cu130", "<2.14,>=2.6")
    assert not is_later("0.2.0.dev1", "0.2.0")


@pytest.mark.parametrize("version", ["", "x", "1.0 and more", "9" * 30, "1." * 30, "1.0" + "x" * 100])
def test_malformed_versions_are_none(version: str) -> None:
    assert release(version) is None
    assert not is_later(version, "0.1")
    assert not is_within(version, ">=0.1")
