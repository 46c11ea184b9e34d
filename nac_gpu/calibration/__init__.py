"""Calibration: real or synthetic inputs, and the activations of neurons on them."""
