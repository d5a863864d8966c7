"""Processes that benchmarks of the tools start: the parts of them that need torch."""
