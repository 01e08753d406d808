"""matplotlib, which draws figures into files where the extra ``plot`` is installed."""

from __future__ import annotations

from mpoc.errors import MpocError


def require_matplotlib() -> None:
    """Check, before any work, that figures can be drawn.

    Raises:
        MpocError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MpocError("--plot needs matplotlib", "pip install 'mpoc[plot]'") from error
