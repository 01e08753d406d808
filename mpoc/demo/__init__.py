"""Data of ``mpoc demo``: handwritten digits and a small network trained on them.

``python -m mpoc.demo.data`` regenerates both files; ATTRIBUTION.md names the source of the digits.
"""
