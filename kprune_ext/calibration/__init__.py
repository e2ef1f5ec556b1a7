"""The hidden states of the calibration data, in teacher and student."""
