"""Calibration: the speed of the present machine, measured, and steps predicted from it."""
