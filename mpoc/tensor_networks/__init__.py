"""Tensor networks that stand for weights: structures, forms, and fits from a weight to cores."""
