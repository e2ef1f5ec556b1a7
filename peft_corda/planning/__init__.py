"""Plans of a calibration: its passes over the data, and what they will cost."""
