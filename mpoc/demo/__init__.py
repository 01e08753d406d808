"""Material for ``mpoc demo``: handwritten digits and a small network trained on them.

``python -m mpoc.demo.make`` makes both files again; ATTRIBUTION.md says where the digits are from.
"""
