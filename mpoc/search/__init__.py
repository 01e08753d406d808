"""The smallest file that keeps a metric: budgets are tried, what was written is measured."""

from mpoc.search.bisection import Bisection, Trial
from mpoc.search.smallest import Smallest, Watch, compress_within

__all__ = ["Bisection", "Smallest", "Trial", "Watch", "compress_within"]
