"""Entanglement of weights: what each cut of a chain of sites carries, dense or in cores."""
