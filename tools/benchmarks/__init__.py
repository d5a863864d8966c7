"""Benchmark processes: the parts of the benchmark tools that need torch."""
