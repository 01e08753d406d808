"""JSON Schemas (2020-12) of what mpoc writes for other programs: the report and the manifest.  No torch here.

Fields that they do not name are allowed: later versions add some.  Of layers both say ``layer.json``.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from mpoc.errors import UsageError, nearest

NAMES = ("report", "manifest")


def schema(name: str) -> dict[str, Any]:
    """The schema of ``mpoc report --json`` ("report") or of a compressed file's manifest ("manifest").

        >>> report = mpoc.read_report("digits-cnn.mpo.safetensors")
        >>> jsonschema.validate(json.loads(report.to_json()), schema("report"))

    Returns:
        The schema, complete in itself.

    Raises:
        UsageError: another name.
    """
    if name not in NAMES:
        raise UsageError(f"no schema of {name!r}{nearest(name, NAMES)}", f"one of {', '.join(NAMES)}")
    found = _read(name)
    parts = {part: _read(part) for part in ("layer", "manifest") if part != name}
    return found | {"$defs": found.get("$defs", {}) | parts}


def _read(name: str) -> dict[str, Any]:
    text = (files(__name__) / f"{name}.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
