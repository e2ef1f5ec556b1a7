"""Retention: how far an adapter moves a layer's outputs on the calibration data, without running it."""
