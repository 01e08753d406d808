"""mpoc: compress trained networks by matrix product operators and other tensor networks."""

__version__ = "0.1.0"
