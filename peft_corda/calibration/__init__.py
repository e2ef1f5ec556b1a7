"""Calibration: from a model and batches to factors."""
