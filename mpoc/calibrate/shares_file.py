"""How a budget was shared out, in a file, so that a compression that goes on need not find it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpoc.calibrate.gain import Shares
from mpoc.digest import digest
from mpoc.manifest import record_to_json
from mpoc.manifest_file import record_from_json
from mpoc.plan import LayerPlan
from mpoc.strict_json import parse_strictly
from mpoc.team import ALONE, Team


def kept_or_shared(
    path: Path, key: str, plans: list[LayerPlan], share: Callable[[], Shares], mates: Team = ALONE
) -> Shares:
    """The shares at ``path`` where they are of this key; else they are found, and kept there.

    Args:
        path: replaced where it is of another key, or damaged.
        key: says what the shares depend on.
        plans: as they are before.
        share: finds them.
        mates: the processes that do this together.

    Raises:
        OSError: of writing.
    """
    found = mates.by_first(lambda: _read(path, key, plans))
    if found is None:
        found = share()
        with mates.together():
            if mates.is_first:
                _write(path, key, found)
    return found


def _write(path: Path, key: str, shares: Shares) -> None:
    beside = path.with_suffix(".writing")
    value = {"key": key, **_to_json(shares)}
    beside.write_text(json.dumps({**value, "digest": digest([], json.dumps(value))}), "utf-8")
    beside.replace(path)


def _to_json(shares: Shares) -> dict[str, Any]:
    layers = [
        {"max_bond": plan.max_bond, "reason": plan.reason, "record": record_to_json(plan.record())}
        for plan in shares.plans
    ]
    return {"chosen": shares.chosen, "distances": shares.distances, "layers": layers}


def _read(path: Path, key: str, plans: list[LayerPlan]) -> Shares | None:
    try:
        value: Any = parse_strictly(path.read_text("utf-8"))
        written = value.pop("digest")
        if value["key"] != key or digest([], json.dumps(value)) != written:
            return None
        layers = [_as_kept(plan, **kept) for plan, kept in zip(plans, value["layers"], strict=True)]
        return Shares(layers, value["chosen"], value["distances"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _as_kept(plan: LayerPlan, max_bond: int | None, reason: str, record: str) -> LayerPlan:
    if max_bond is None:
        return replace(plan, max_bond=None, low_rank=0, reason=reason)
    kept = record_from_json(record)
    return replace(plan, structure=kept.structure, max_bond=max_bond, low_rank=kept.low_rank, reason=reason)
