"""Names of the clocks of a calibration, for command lines that load no torch."""

CLOCKS = ("elapsed", "processor")
"""Elapsed time, or processor time of the process: the latter knows nothing of other programs."""
