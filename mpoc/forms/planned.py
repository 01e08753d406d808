"""Plans that are made while a graph is traced, without being traced themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile run a planner instead of tracing it.

    The public decorator, torch.compiler.assume_constant_result, does just this but imports the whole compiler
    (1.6 s) first.
    """

    def run(*arguments: Any) -> Any:
        return function(*arguments)

    run._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return run
