"""What of a training split is held out to measure on: the same in ``eval`` as in the training before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpoc.data import Data, hold_out
from mpoc.errors import UsageError

SHARE = 0.1  # of a training split, where there is nothing else to measure on
# The same in ``eval`` as in ``finetune --seed 7``, or training data would be measured.
_SEED = 0


def hold_out_to_train(data: Data, asked: float | None, wants_validation: bool) -> tuple[Data, float]:
    """The set with a validation split where training needs one.

    Args:
        data: as its files split it.
        asked: share of ``train`` to hold out; None: ``SHARE`` where there is nothing to measure on.
        wants_validation: a test split is nothing to measure on.

    Returns:
        The set, and the share that was held out.

    Raises:
        UsageError: the share is out of range.
    """
    measured = "test" in data.splits and not wants_validation
    return _held(data, (0.0 if measured else SHARE) if asked is None else asked)


def hold_out_to_measure(
    data: Data, asked: float | None, history: dict[str, Any], fingerprint: str
) -> tuple[Data, float]:
    """The set with what a training on it held out, all of it where there was none; ``notes`` says which.

    Args:
        data: as its files split it.
        asked: share of ``train`` to hold out; None: as the network's training did.
        history: of the network.
        fingerprint: of the data's files.

    Raises:
        UsageError: the share is out of range.
    """
    if asked is not None:
        return _held(data, asked)
    learnt = _trained_on(history, fingerprint)
    found, share = _held(data, (learnt or {}).get("held_out", 0.0))
    if share:
        said = f"{share:.3g} of train is held out, as in the network's training on this set"
    elif list(data.splits) != ["train"]:
        return data, share
    elif learnt is None:
        said = "all of it is measured: no training of the network on this set is recorded"
    else:
        said = "all of it is measured, and all of it is what the network was trained on"
    return replace(found, notes=(*data.notes, said)), share


def _held(data: Data, share: float) -> tuple[Data, float]:
    if not 0 <= share < 1:
        raise UsageError(f"--hold-out {share:g}: a share, at least 0 and below 1")
    if share == 0 or "train" not in data.splits or "validation" in data.splits:
        return data, 0.0
    return hold_out(data, share, _SEED), share


def _trained_on(history: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """The record of the data of the last training on this set."""
    while history:
        found: dict[str, Any] = history.get("data", {})
        if found.get("fingerprint") == fingerprint:
            return found
        history = history.get("earlier", {})
    return None
