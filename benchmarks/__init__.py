"""Benchmarks: measured against the dense model in one run, interleaved, medians, appended to ``ledger.csv``."""
