"""Oracles: the publications, written down naively in float64."""
