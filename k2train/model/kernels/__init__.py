"""Implementations of attention, norm, elementwise and matrix operations."""
