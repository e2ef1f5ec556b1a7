"""What a calibration is estimated to take, as numbers and as text."""

from __future__ import annotations
