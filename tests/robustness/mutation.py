"""How many small faults in the product the tests see.

    python tests/robustness/mutation.py [--seed 0] [--faults 30] [--whole]

A seed picks modules from ten packages, three each, and flips one comparison, sign or index in each of them,
one at a time, in a copy of the checkout. The tests of that module run first, then those of its package, then
all the quick ones, and with ``--whole`` the slow ones too, until one fails. Prints a line a fault and the
numbers seen by each.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "runtime", "tensor_networks", "data", "io", "nn",
    "reporting", "models", "train", "compression", "reproduce",
)  # fmt: skip
_FLIPPED = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+",
}  # fmt: skip
_LONGEST = 1800  # seconds; a suite that takes more hangs, which counts as seen


@dataclass(frozen=True)
class Fault:
    """One change of one line."""

    path: Path  # relative to the checkout
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before.strip()}  →  {self.after.strip()}"


def faults_of(path: Path) -> Iterator[Fault]:
    """Every fault that can be put into a module: each comparison, sign and constant index, flipped."""
    source = (ROOT / path).read_text("utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            flipped = _FLIPPED.get(type(node.ops[0]))
            yield from _between(path, lines, node.left, node.comparators[0], flipped)
        elif isinstance(node, ast.BinOp) and not isinstance(node.left, ast.Constant | ast.JoinedStr):
            yield from _between(path, lines, node.left, node.right, _FLIPPED.get(type(node.op)))
        elif isinstance(node, ast.Subscript) and _is_index(index := node.slice):
            yield from _replaced(path, lines, index.lineno, index.col_offset, index.end_col_offset, "1")


def _is_index(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def _between(
    path: Path, lines: list[str], left: ast.expr, right: ast.expr, operator: str | None
) -> Iterator[Fault]:
    """The operator between two operands of one line, replaced."""
    if operator is not None and left.end_lineno == right.lineno and left.end_lineno is not None:
        end, start = left.end_col_offset, right.col_offset
        yield from _replaced(path, lines, right.lineno, end, start, operator, operand=True)


def _replaced(
    path: Path,
    lines: list[str],
    line: int,
    start: int | None,
    end: int | None,
    text: str,
    operand: bool = False,
) -> Iterator[Fault]:
    before = lines[line - 1].encode()  # columns are of bytes
    old = before[start:end].decode()
    if operand:
        bare = old.strip()
        if not bare or bare.strip("<>=!+-*"):  # brackets or a comment in between
            return
        text = old.replace(bare, text)
    elif old == text:
        text = "0"
    after = (before[:start] + text.encode() + before[end:]).decode()
    yield Fault(path, line, before.decode(), after)


def pick(seed: int, count: int) -> list[Fault]:
    """``count`` faults, as many in each package, no two in one module."""
    draw = random.Random(seed)
    faults: list[Fault] = []
    for number, package in enumerate(PACKAGES):
        modules = sorted(path.relative_to(ROOT) for path in (ROOT / "mpoc" / package).rglob("*.py"))
        draw.shuffle(modules)
        share = count * (number + 1) // len(PACKAGES) - count * number // len(PACKAGES)
        chosen = (draw.choice(found) for module in modules if (found := [*faults_of(module)]))
        faults += [fault for fault, _ in zip(chosen, range(share), strict=False)]
    return faults


def passes(checkout: Path, *arguments: str) -> bool:
    """Whether these tests pass in a checkout."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, timeout=_LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode in (0, 5)  # 5: none collected


def seen_by(fault: Fault, checkout: Path, whole: bool) -> str:
    """What sees a fault: "quick", "whole" or "none"."""
    file = checkout / fault.path
    source = file.read_text("utf-8")
    lines = source.splitlines(keepends=True)
    lines[fault.line - 1] = fault.after + "\n"
    file.write_text("".join(lines), "utf-8")
    try:
        package = f"tests/{fault.path.parts[1]}"
        own = [str(test) for test in (checkout / package).rglob(f"test_{fault.path.stem}*.py")]
        if own and not passes(checkout, "-n0", *own):
            return "quick"
        if not passes(checkout, package) or not passes(checkout):
            return "quick"
        slow = "-m", "slow"
        if whole and not (passes(checkout, *slow, package) and passes(checkout, *slow)):
            return "whole"
        return "none"
    finally:
        file.write_text(source, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--whole", action="store_true", help="run the slow tests on what the quick ones miss")
    arguments = parser.parse_args()
    counts = dict.fromkeys(("quick", "whole", "none"), 0)
    with tempfile.TemporaryDirectory() as scratch:
        checkout = Path(scratch) / "checkout"
        shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
        for fault in pick(arguments.seed, arguments.faults):
            answer = seen_by(fault, checkout, arguments.whole)
            counts[answer] += 1
            print(f"{answer:5}  {fault}", flush=True)
    print(*(f"{name}: {count}" for name, count in counts.items()), sep=", ")


if __name__ == "__main__":
    main()
