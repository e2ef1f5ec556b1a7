"""A calibration that was interrupted: what is kept of it, and whether it is the same one."""
