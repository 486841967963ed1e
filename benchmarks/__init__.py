"""Benchmarks: one command a claim, results as JSON lines."""
