"""Fits: from a weight to the cores of a form."""
