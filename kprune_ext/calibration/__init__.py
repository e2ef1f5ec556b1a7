"""Calibration data on their way up through teacher and student."""
