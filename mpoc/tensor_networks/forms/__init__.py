"""Forms: the tensor networks that stand for a weight."""
