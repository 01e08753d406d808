"""Calibration: fit layers to what they compute on real inputs, in the order of the network."""
