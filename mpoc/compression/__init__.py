"""Compression of checkpoints and networks: recipe, selection, plan, budget, fit, writer."""
