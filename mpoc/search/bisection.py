"""Which budgets to try for the smallest output that keeps a metric, as plain data.

A smaller ρ mostly loses more, so the interval between a ρ that lost too much and one that did not is halved.
Metrics on finite data are not quite monotone.  Nothing is inferred from that order but where to try next: the
answer is the smallest output of those that were written, measured and found good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_GRID = 1000  # ratios have three decimals
_FINE = 0.02  # the share of ρ at which an interval is narrow enough
_MOST_TRIALS = 8


@dataclass(frozen=True)
class Trial:
    """One output that was written and measured."""

    ratio: float  # that was asked for
    nbytes: int  # on disk
    drop: float  # of the metric, in its unit; negative: a gain; NaN: it is no number
    scores: Mapping[str, float]


@dataclass
class Bisection:
    """Ask for a ratio, add what was found at it, until there is none to ask for.

    Args:
        max_drop: that the metric may lose.
        least: ρ that no output can go below.
    """

    max_drop: float
    least: float = 0.0
    trials: list[Trial] = field(default_factory=list)  # in the order they were made

    def keeps(self, trial: Trial) -> bool:
        """Whether the metric loses no more than it may."""
        return trial.drop <= self.max_drop

    def next_ratio(self) -> float | None:
        """The next ratio to try; None: the search is over."""
        low, high = math.floor(self.least * _GRID), _GRID
        for trial in self.trials:
            tried = round(trial.ratio * _GRID)
            low, high = (low, tried) if self.keeps(trial) else (tried, high)
        middle = (low + high) // 2
        fine = bool(self.trials) and high - low <= _FINE * high
        over = middle == low or fine or len(self.trials) == _MOST_TRIALS
        return None if over else middle / _GRID

    @property
    def chosen(self) -> Trial | None:
        """The smallest that keeps the metric, of equal ones that which loses least; None: none does."""
        kept = [trial for trial in self.trials if self.keeps(trial)]
        return min(kept, key=lambda trial: (trial.nbytes, trial.drop), default=None)

    @property
    def nearest(self) -> Trial | None:
        """That which loses least; None: no trial has a drop that is a number."""
        known = [trial for trial in self.trials if not math.isnan(trial.drop)]
        return min(known, key=lambda trial: (trial.drop, trial.nbytes), default=None)
