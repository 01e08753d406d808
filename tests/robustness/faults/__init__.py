"""Faults from outside, by the thousand: ``python -m tests.robustness.faults --minutes 10 --seed 0``."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy starts its threads: with any, no fork is sound
