"""Verification of a data folder against its manifest."""
