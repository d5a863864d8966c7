"""Inspection of a data folder: accounts, samples, provenance, use by runs."""
