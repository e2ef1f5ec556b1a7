"""What several benchmarks use: texts, models, memory and how results are written."""
