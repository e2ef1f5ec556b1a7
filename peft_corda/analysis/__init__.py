"""Factors, looked at: spectra, ranks and a report."""
