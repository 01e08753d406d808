"""Store tensors in few bits: grids of integers, entropy-coded integers, and rounding with feedback."""
