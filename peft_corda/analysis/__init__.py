"""Analysis of factors: spectra, ranks and a report."""
