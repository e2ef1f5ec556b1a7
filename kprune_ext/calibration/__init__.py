"""Calibration data, and their hidden states in teacher and student."""
