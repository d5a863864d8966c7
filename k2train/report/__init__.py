"""Report of a run: one self-contained HTML page of what the run has on record."""
