"""Calibration data: batches, the samples taken from them, and how processes share them."""
