"""Uniform quantisation and the calibration Hessian that every layer-wise solver shares."""
